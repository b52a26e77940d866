"""DDIM and DDPM: first-order steps, deterministic or with the noise of the posterior."""

import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.fields import Fraction
from sdiff_jax.samplers import tableau
from sdiff_jax.samplers.tableau import SolverStep, SolverTableau


@registry.register("samplers.solvers", "ddim", timesteps=time_grids.uniform_timesteps)
def ddim(schedule: NoiseSchedule, eta: Fraction = 0.0) -> SolverTableau:
  """x' = alpha' d + (sigma'^2 - s^2)^(1/2) (x - alpha d) / sigma + s z.

  s^2 = eta^2 sigma'^2 (1 - (alpha sigma' / (alpha' sigma))^2) (arXiv:2010.02502, eq.
  12 and 16). With eta = 0 it is the rotation of arXiv:2410.11081, section 3, on the
  TrigFlow process, and Euler's method on the processes of EDM and of rectified flow.

  Args:
    schedule: the noise level at each step.
    eta: fraction of the noise of DDPM's posterior; 0 is an ODE solver, 1 is DDPM.

  Raises:
    ValueError: eta is not in [0, 1].

  Example:
    >>> from sdiff_jax.diffusion import noise_schedules
    >>> ddim(noise_schedules.edm(np.array([2.0, 1.0, 0.0]))).denoised_coef[:, 0]
    array([0.5, 1. ])
  """
  s = eta * tableau.posterior_std(schedule)
  a = (schedule.sigma_next**2 - s**2) ** 0.5 / schedule.sigma
  b = schedule.alpha_next - schedule.alpha * a
  # x' = a x + (alpha' - alpha a) d + s z
  steps = [SolverStep(i, [a[i]], [b[i]], s[i]) for i in range(len(a))]
  return tableau.assemble(schedule, steps)


@registry.register("samplers.solvers", "euler", timesteps=time_grids.karras_timesteps)
def euler(schedule: NoiseSchedule) -> SolverTableau:
  """Euler's method in the noise level sigma / alpha, which is the step of DDIM.

  Args:
    schedule: the noise level at each step.
  """
  return ddim(schedule)


@registry.register(
  "samplers.solvers", "euler_ancestral", timesteps=time_grids.karras_timesteps
)
def euler_ancestral(schedule: NoiseSchedule) -> SolverTableau:
  """Euler's step to a lower level and fresh noise, which is the step of DDPM.

  With r = sigma / alpha the noise has the level r' (1 - (r' / r)^2)^(1/2), as in
  k-diffusion and diffusers.

  Args:
    schedule: the noise level at each step.
  """
  return ddpm(schedule)


@registry.register("samplers.solvers", "ddpm", timesteps=time_grids.uniform_timesteps)
def ddpm(schedule: NoiseSchedule) -> SolverTableau:
  """Ancestral sampling: x' ~ N(E[x' | x, x0 = d], s^2) (arXiv:2006.11239, eq. 6-7).

  s is the standard deviation of the posterior ("fixed small" variance).

  Args:
    schedule: the noise level at each step.
  """
  return ddim(schedule, eta=1.0)


@registry.register(
  "samplers.solvers", "ddpm_large", timesteps=time_grids.uniform_timesteps
)
def ddpm_large(schedule: NoiseSchedule) -> SolverTableau:
  """DDPM with the "fixed large" variance (arXiv:2006.11239, section 3.2).

  s^2 = beta = sigma^2 - (alpha sigma' / alpha')^2, and 0 in a step to clean data.

  Args:
    schedule: the noise level at each step.
  """
  ratio = schedule.alpha * schedule.sigma_next / schedule.alpha_next
  beta = schedule.sigma**2 - ratio**2
  return ddpm(schedule)._replace(
    noise_coef=np.where(schedule.sigma_next > 0, beta**0.5, 0.0)
  )
