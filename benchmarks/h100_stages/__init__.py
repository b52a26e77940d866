"""The stages of benchmarks/h100.py."""
