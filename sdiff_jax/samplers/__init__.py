"""Sampling: solvers as tables of coefficients, and the loops that run them.

    sampler = samplers.build("paraddim", sigma_d=0.5, steps=50, window=16)
    samples = samplers.sample(sampler, denoiser, range(64), shape=(8, 8, 1))

`sample` is the only way from a seed to a sample. A solver and a sampling loop are each
one file that registers itself (kinds "samplers.solvers" and "samplers").
"""

from sdiff_jax.samplers._samples import Samples
from sdiff_jax.samplers.sampler import (
  MAX_SEED,
  Sampler,
  SamplingStats,
  build,
  check_seeds,
  from_tableau,
  names,
  options,
  sample,
  solver_of,
  takes,
)

__all__ = [
  "MAX_SEED",
  "Sampler",
  "Samples",
  "SamplingStats",
  "build",
  "check_seeds",
  "from_tableau",
  "names",
  "options",
  "sample",
  "solver_of",
  "takes",
]
