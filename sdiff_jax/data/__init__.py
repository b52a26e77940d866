"""Data sets, one a file, and the loader of batches."""
