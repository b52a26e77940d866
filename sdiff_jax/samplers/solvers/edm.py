"""EDM's stochastic sampler: Heun's method with churn."""

from typing import Annotated

import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.fields import NotNegative, Range
from sdiff_jax.samplers.solvers import heun
from sdiff_jax.samplers.tableau import SolverTableau


@registry.register(
  "samplers.solvers", "edm_stochastic", timesteps=time_grids.karras_timesteps
)
def edm_stochastic(
  schedule: NoiseSchedule,
  s_churn: NotNegative = 40.0,
  s_tmin: NotNegative = 0.05,
  s_tmax: Annotated[float, Range(0, finite=False)] = 50.0,
  s_noise: NotNegative = 1.003,
) -> SolverTableau:
  """Stochastic sampling of EDM (arXiv:2206.00364, algorithm 2).

  Before a step at noise level n = sigma / alpha in [s_tmin, s_tmax], noise raises it to
  n_hat = n + gamma n, gamma = min(s_churn / N, 2^(1/2) - 1); then Heun's method takes
  n_hat to the next level. The defaults are those of the paper for ImageNet-64 (table 5).

  Args:
    schedule: the noise level at each of N steps.
    s_churn: the amount of noise that is added, over all steps; 0 is `heun`.
    s_tmin: lowest noise level at which noise is added.
    s_tmax: highest noise level at which noise is added.
    s_noise: factor of the standard deviation of the added noise.

  Raises:
    ValueError: a noise level that starts too high.

  Example:
    >>> from sdiff_jax.diffusion import noise_schedules
    >>> schedule = noise_schedules.edm(np.array([2.0, 1.0, 0.0]))
    >>> edm_stochastic(schedule, s_churn=0.5, s_noise=1.0).noise_before
    array([1.5 , 0.  , 0.75])
  """
  noise = schedule.sigma / schedule.alpha
  inside = (s_tmin <= noise) & (noise <= s_tmax)
  gamma = min(s_churn / len(noise), 2**0.5 - 1)
  return heun.heun_with_churn(schedule, np.where(inside, gamma, 0.0), s_noise)
