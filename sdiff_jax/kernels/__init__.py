"""Kernels, each beside its twin in plain JAX."""
