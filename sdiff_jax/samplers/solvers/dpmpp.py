"""DPM-Solver++ multistep: 2M and 3M, and 2M for the reverse SDE."""

from collections.abc import Sequence

import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.samplers import tableau
from sdiff_jax.samplers.tableau import SolverStep, SolverTableau

SHORT = 15  # with fewer steps, the last ones are of lower order


@registry.register("samplers.solvers", "dpmpp2m", timesteps=time_grids.karras_timesteps)
def dpmpp2m(
  schedule: NoiseSchedule, final_orders: Sequence[int] | None = None
) -> SolverTableau:
  """DPM-Solver++(2M) (see `dpmpp`).

  Args:
    schedule: the noise level at each step.
    final_orders: see `dpmpp`.
  """
  return dpmpp(schedule, 2, final_orders=final_orders)


@registry.register("samplers.solvers", "dpmpp3m", timesteps=time_grids.karras_timesteps)
def dpmpp3m(
  schedule: NoiseSchedule, final_orders: Sequence[int] | None = None
) -> SolverTableau:
  """DPM-Solver++(3M) (see `dpmpp`).

  Args:
    schedule: the noise level at each step.
    final_orders: see `dpmpp`.
  """
  return dpmpp(schedule, 3, final_orders=final_orders)


@registry.register(
  "samplers.solvers", "dpmpp2m_sde", timesteps=time_grids.uniform_timesteps
)
def dpmpp2m_sde(
  schedule: NoiseSchedule, final_orders: Sequence[int] | None = None
) -> SolverTableau:
  """SDE-DPM-Solver++(2M), which adds noise in every step (see `dpmpp`).

  Args:
    schedule: the noise level at each step.
    final_orders: see `dpmpp`.
  """
  return dpmpp(schedule, 2, sde=True, final_orders=final_orders)


def dpmpp(
  schedule: NoiseSchedule,
  order: int = 2,
  *,
  sde: bool = False,
  final_orders: Sequence[int] | None = None,
) -> SolverTableau:
  """DPM-Solver++ multistep in x0 (arXiv:2211.01095, algorithm 2 and appendix B).

  With l = ln(alpha / sigma) and h = l' - l, the first order is the step of DDIM; higher
  orders add differences of the previous denoised values. The first steps have the order
  that their history allows. A step to clean data is of first order. 3M is the solver that
  its authors run: its second difference has half the weight of a third-order method.

  Args:
    schedule: the noise level at each step; every step starts where the last one ends.
    order: 1, 2 (2M, midpoint) or 3 (3M).
    sde: solve the reverse SDE, with noise in every step; order 1 or 2.
    final_orders: the largest orders of the last steps; None for 2 and 1 with fewer than
      15 steps, because higher orders overshoot there.

  Raises:
    ValueError: an order that does not exist.

  Example:
    >>> from sdiff_jax.diffusion import noise_schedules
    >>> schedule = noise_schedules.edm(np.geomspace(20, 0.1, 21))
    >>> dpmpp(schedule, order=3).denoised_coef.shape
    (20, 3)
  """
  if order not in ((1, 2) if sde else (1, 2, 3)):
    raise ValueError(
      f"order={order}: must be 1, 2 or 3, and 1 or 2 for the SDE of DPM-Solver++"
    )
  log_snr, log_snr_next = _log_snr(schedule)
  num_steps, h, steps = len(log_snr), log_snr_next - log_snr, []
  if final_orders is None:
    final_orders = short_orders(num_steps)
  max_orders = [order] * num_steps + [*final_orders]
  for i, max_order in enumerate(max_orders[-num_steps:]):
    if schedule.sigma_next[i] == 0 or h[i] == 0:
      max_order = 1
    weights = _weights(h[: i + 1], min(order, max_order, i + 1), sde)
    ratio, alpha_next = (
      schedule.sigma_next[i] / schedule.sigma[i],
      schedule.alpha_next[i],
    )
    # ODE: x' = sigma'/sigma x + alpha' (1 - e^-h) D
    # SDE: x' = sigma'/sigma e^-h x + alpha' (1 - e^-2h) D + sigma' (1 - e^-2h)^(1/2) z
    x = [ratio * (np.exp(-h[i]) if sde else 1.0)]
    denoised = [alpha_next * weight for weight in weights]
    noise = schedule.sigma_next[i] * (-np.expm1(-2 * h[i])) ** 0.5 if sde else 0.0
    steps.append(SolverStep(i, x, denoised, noise))
  return tableau.assemble(schedule, steps)


def short_orders(num_steps: int) -> tuple[int, ...]:
  """Returns the largest orders of the last steps: 2 and 1 with fewer than 15 steps.

  Args:
    num_steps: number of steps.

  Example:
    >>> short_orders(14), short_orders(15)
    ((2, 1), ())
  """
  return (2, 1) if num_steps < SHORT else ()


def _log_snr(schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
  """Returns ln(alpha / sigma) at the start and at the end of each step."""
  with np.errstate(divide="ignore"):
    start = np.log(schedule.alpha) - np.log(schedule.sigma)
    end = np.log(schedule.alpha_next) - np.log(schedule.sigma_next)
  return start, end


def _weights(h: np.ndarray, order: int, sde: bool) -> tuple[float, ...]:
  """Returns the weights of d_i, d_{i-1} and d_{i-2} in (1 - e^-h) D.

  Args:
    h: steps in ln(alpha / sigma) up to this one, which is the last of the array.
    order: order of this step.
    sde: as in `dpmpp`.
  """
  one = -np.expm1(-(1 + sde) * h[-1])  # 1 - e^-h
  if order == 1:
    return one, 0.0, 0.0
  r = h[-2] / h[-1]
  if order == 2:
    half = one / (2 * r)
    return one + half, -half, 0.0  # D = d_i + (d_i - d_{i-1}) / (2 r)
  r_1 = h[-3] / h[-1]
  # Weights of the first and of the second difference, then of the denoised values.
  first = 1 - one / h[-1]
  second = (h[-1] - one) / h[-1] ** 2 - 0.5
  D_1_0, D_1_1 = np.array([1, -1, 0]) / r, np.array([0, 1, -1]) / r_1
  D_1 = D_1_0 + r / (r + r_1) * (D_1_0 - D_1_1)
  D_2 = (D_1_0 - D_1_1) / (r + r_1)
  return tuple(np.array([one, 0, 0]) + first * D_1 - second * D_2)
