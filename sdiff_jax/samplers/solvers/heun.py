"""Heun's method in the noise level: EDM's second-order solver, without and with churn."""

import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.samplers import tableau
from sdiff_jax.samplers.tableau import SolverStep, SolverTableau

MAX_NOISE = 1000.0  # of sigma / alpha at the start; EDM starts at 80


@registry.register("samplers.solvers", "heun", timesteps=time_grids.karras_timesteps)
def heun(schedule: NoiseSchedule) -> SolverTableau:
  """EDM's deterministic second-order solver (arXiv:2206.00364, algorithm 1).

  An Euler step to the next noise level, then the mean of the two noise predictions; the
  last step, to noise 0, is Euler's alone. N steps cost 2 N - 1 evaluations. On other
  processes it is written for y = x / alpha at noise level n = sigma / alpha.

  Args:
    schedule: the noise level at each step.

  Raises:
    ValueError: the noise level starts above 1000, where steps in it are useless.

  Example:
    >>> from sdiff_jax.diffusion import noise_schedules
    >>> heun(noise_schedules.edm(np.array([2.0, 1.0, 0.0]))).evaluations
    3
  """
  return heun_with_churn(schedule, np.zeros(len(schedule.time)), noise_factor=0.0)


def heun_with_churn(
  schedule: NoiseSchedule, churn: np.ndarray, noise_factor: float
) -> SolverTableau:
  """Returns Heun's method with noise added before every step.

  A step first raises its noise level n to n_hat = (1 + churn) n. State i is stored with
  the alpha at that higher level, alpha_hat y instead of alpha y, so that the noise is
  added to it without another factor; the previous step produces it with that factor.

  Args:
    schedule: the noise level at each of N steps.
    churn: relative increase of the noise level before each step, float64 [N].
    noise_factor: factor of the standard deviation of the added noise.

  Raises:
    ValueError: the noise level starts too high.
  """
  noise = schedule.sigma / schedule.alpha
  noise_next = schedule.sigma_next / schedule.alpha_next
  if noise[0] > MAX_NOISE:
    raise ValueError(
      f"timesteps: heun cannot start at noise level {noise[0]:.4g} (pi/2 is infinite); "
      f"start below {MAX_NOISE:g}, or use dpm2s or ddim"
    )
  starts = [*zip(schedule.alpha, schedule.sigma, schedule.time, strict=True)]
  points = [
    schedule.point(-np.log((1 + churn[i]) * noise[i])) if churn[i] else start
    for i, start in enumerate(starts)
  ]
  rescale = np.array([point[0] for point in points]) / schedule.alpha
  rescale_next = np.append(rescale[1:], 1.0)  # of the state that a step produces
  steps = []
  for i, (alpha_hat, *_) in enumerate(points):
    n, n_next, alpha_next = noise[i], noise_next[i], schedule.alpha_next[i]
    # x_hat = x + alpha_hat (n_hat^2 - n^2)^(1/2) S_noise z', then y = x_hat / alpha_hat
    n_hat = (1 + churn[i]) * n
    added = alpha_hat * noise_factor * (n_hat**2 - n**2) ** 0.5
    gain, h = alpha_next / alpha_hat, n_next - n_hat
    # y' = y + h (y - d) / n_hat
    x, denoised = [gain * (1 + h / n_hat)], [-alpha_next * h / n_hat]
    steps.append(SolverStep(i, x, denoised, noise_before=added, point=points[i]))
    if n_next == 0:
      continue
    # y'' = y + h/2 (y - d) / n_hat + h/2 (y' - d') / n'
    x = [h / (2 * n_next), gain * (1 + h / (2 * n_hat))]
    denoised = [-alpha_next * h / (2 * n_next), -alpha_next * h / (2 * n_hat)]
    x, denoised = ([rescale_next[i] * c for c in values] for values in (x, denoised))
    point = schedule.point(-np.log(n_next))
    steps.append(SolverStep(i, x, denoised, point=point))
  result = tableau.assemble(schedule, steps)
  return result._replace(init_std=float(rescale[0] * schedule.sigma[0]))
