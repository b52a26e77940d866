"""DPM-Solver++(2S): a singlestep solver of second order."""

import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.samplers import tableau
from sdiff_jax.samplers.tableau import SolverStep, SolverTableau


@registry.register("samplers.solvers", "dpm2s", timesteps=time_grids.karras_timesteps)
def dpm2s(schedule: NoiseSchedule) -> SolverTableau:
  """DPM-Solver++(2S) with r = 1/2 (arXiv:2211.01095, algorithm 1).

  A DDIM step to the midpoint in ln(alpha / sigma), then a DDIM step over the whole
  interval with the denoised value of the midpoint. The last step, to noise 0, is a DDIM
  step alone: N steps cost 2 N - 1 evaluations.

  Args:
    schedule: the noise level at each step.

  Example:
    >>> from sdiff_jax.diffusion import noise_schedules
    >>> dpm2s(noise_schedules.edm(np.array([4.0, 1.0, 0.0]))).time
    array([4., 2., 1.])
  """
  steps = []
  for i, (alpha, sigma, _, alpha_next, sigma_next) in enumerate(
    zip(*schedule[:5], strict=True)
  ):
    whole = alpha_next - alpha * sigma_next / sigma
    if sigma_next == 0:
      steps.append(SolverStep(i, [0.0], [whole]))  # x' = alpha' d
      continue
    middle = (np.log(alpha / sigma) + np.log(alpha_next / sigma_next)) / 2
    point = alpha_m, sigma_m, _ = schedule.point(middle)
    half = alpha_m - alpha * sigma_m / sigma
    # x_m = sigma_m/sigma x + (alpha_m - alpha sigma_m/sigma) d
    steps.append(SolverStep(i, [sigma_m / sigma], [half]))
    # x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) d_m
    steps.append(SolverStep(i, [0.0, sigma_next / sigma], [whole], point=point))
  return tableau.assemble(schedule, steps)
