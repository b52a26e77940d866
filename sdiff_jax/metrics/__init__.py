"""Metrics of sample sets, computed on arrays of features."""
