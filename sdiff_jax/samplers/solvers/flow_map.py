"""Multistep sampling of two-time flow maps."""

import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.fields import Fraction
from sdiff_jax.samplers import tableau
from sdiff_jax.samplers.tableau import SolverStep, SolverTableau


@registry.register(
  "samplers.solvers", "flow_map", timesteps=time_grids.consistency_timesteps
)
def flow_map(schedule: NoiseSchedule, gamma: Fraction = 0.0) -> SolverTableau:
  """x_s = f(x, t, s), x' = (alpha' / alpha_s) x_s + noise: jump to s, then add noise.

  Each step jumps to a time s whose noise level sigma_s / alpha_s is (1 - gamma^2)^(1/2)
  times that of the step's end, and adds the noise that is missing (gamma-sampling of
  CTM, arXiv:2310.02279). gamma = 0 is deterministic, and gamma = 1 is the sampler of
  consistency models.

  Args:
    schedule: the noise level at each step.
    gamma: fraction of the noise level that is fresh in every step.

  Example:
    >>> from sdiff_jax.diffusion import noise_schedules
    >>> schedule = noise_schedules.trigflow(np.array([1.5, 0.5, 0.0]), sigma_d=0.5)
    >>> flow_map(schedule).end_time.round(6)
    array([0.5, 0. ])
  """
  steps, end_times = [], []
  levels = zip(schedule.alpha_next, schedule.sigma_next, strict=True)
  for i, (alpha_next, sigma_next) in enumerate(levels):
    with np.errstate(divide="ignore"):
      log_snr = np.log(alpha_next) - np.log(sigma_next) - 0.5 * np.log(1 - gamma**2)
    alpha_s, sigma_s, end_time = schedule.point(log_snr)
    a = sigma_s / schedule.sigma[i]
    scale = alpha_next / alpha_s
    noise = max(sigma_next**2 - (scale * sigma_s) ** 2, 0.0) ** 0.5
    b = alpha_s - schedule.alpha[i] * a
    # x_s = a x + b d
    steps.append(SolverStep(i, [scale * a], [scale * b], noise if gamma else 0.0))
    end_times.append(end_time)
  return tableau.assemble(schedule, steps)._replace(end_time=np.array(end_times))
