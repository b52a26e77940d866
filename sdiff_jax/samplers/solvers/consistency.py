"""Multistep sampling of consistency models."""

import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.samplers import tableau
from sdiff_jax.samplers.tableau import SolverStep, SolverTableau


@registry.register(
  "samplers.solvers", "consistency", timesteps=time_grids.consistency_timesteps
)
def consistency(schedule: NoiseSchedule) -> SolverTableau:
  """x' = alpha' d + sigma' z: jump to data, then add fresh noise.

  The sampler of consistency models (arXiv:2303.01469, algorithm 1), where the denoiser
  is the consistency function, d = f.

  Args:
    schedule: the noise level at each step.

  Example:
    >>> import numpy as np
    >>> from sdiff_jax.diffusion import noise_schedules
    >>> consistency(noise_schedules.edm(np.array([2.0, 1.0, 0.0]))).noise_coef
    array([1., 0.])
  """
  levels = zip(schedule.alpha_next, schedule.sigma_next, strict=True)
  # x' = alpha' d + sigma' z
  steps = [
    SolverStep(i, [0.0], [alpha], sigma) for i, (alpha, sigma) in enumerate(levels)
  ]
  _, _, clean = schedule.point(np.inf)
  ends = np.full(len(steps), clean)
  return tableau.assemble(schedule, steps)._replace(end_time=ends)
