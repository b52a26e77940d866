"""Samplers: solvers are tables of coefficients, run by a loop over a denoiser."""
