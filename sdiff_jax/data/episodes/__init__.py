"""Readers of recorded robot episodes, one format a file."""
