"""Methods that are kept for comparison."""
