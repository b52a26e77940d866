"""Fast diffusion models in JAX: few-step training (sCM) and parallel sampling."""

__version__ = "0.1.0"
