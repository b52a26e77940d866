"""Samplers: solvers as tables of coefficients, and the loops that run them."""
