"""A solver: the Adams-Bashforth method of order 2, one evaluation for each step."""

import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids
from sdiff_jax.samplers.tableau import SolverStep, assemble


@registry.register("samplers.solvers", "ab2", timesteps=time_grids.karras_timesteps)
def build(schedule):
  """Adams-Bashforth in the noise level s = sigma / alpha.

  The probability flow of y = x / alpha is dy/ds = (y - d) / s = f. With h the change of
  s in a step and w = h / h_before, the method is

      y' = y + h ((1 + w / 2) f - w / 2 f_before),

  and Euler's method in the first step and in the one to s = 0.

  Args:
    schedule: noise levels at the start and end of each step.
  """
  alpha, alpha_next = schedule.alpha, schedule.alpha_next
  s, s_next = schedule.sigma / alpha, schedule.sigma_next / alpha_next
  h, steps = s_next - s, []
  for i in range(len(h)):
    w = h[i] / h[i - 1] if i and s_next[i] > 0 else 0.0
    now = h[i] * (1 + w / 2) / s[i]  # y' = y + now (y - d) + before (y - d)_{i-1}
    before = -h[i] * w / 2 / s[i - 1] if i else 0.0
    x = np.array([(1 + now) / alpha[i], before / alpha[i - 1] if i else 0.0])
    denoised = np.array([-now, -before])
    steps.append(SolverStep(i, alpha_next[i] * x, alpha_next[i] * denoised))
  return assemble(schedule, steps)
