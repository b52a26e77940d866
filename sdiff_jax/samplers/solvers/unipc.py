"""UniPC: a multistep predictor and corrector with one evaluation for each step.

Zhao et al., arXiv:2302.04867. The predictor (UniP) takes the corrected state x^c_i to
x_{i+1}, the denoiser is evaluated there, and the corrector (UniC) uses that value to
compute x^c_{i+1}. With m_i = d(x_i), S_i = sigma'/sigma and weights P of the predictor
and C of the corrector of step i,

    x_{i+1}   = S_i x^c_i + sum_n P_in m_{i-n},
    x^c_{i+1} = S_i x^c_i + sum_n C_in m_{i+1-n} = x_{i+1} + C_i0 m_{i+1}
                + sum_n (C_i,n+1 - P_in) m_{i-n}.

The second line expresses the corrected state by the predicted one, so the recurrence of
the predicted states needs one state and order + 1 denoised values.
"""

from typing import Annotated, Literal

import numpy as np

from sdiff_jax import fields, registry
from sdiff_jax.diffusion import time_grids
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.fields import Range
from sdiff_jax.samplers import tableau
from sdiff_jax.samplers.tableau import SolverStep, SolverTableau

Variant = Literal["bh1", "bh2"]


@registry.register("samplers.solvers", "unipc2", timesteps=time_grids.karras_timesteps)
def unipc2(schedule: NoiseSchedule, variant: Variant = "bh2") -> SolverTableau:
  """UniPC of order 2 (see `unipc`).

  Args:
    schedule: the noise level at each step.
    variant: see `unipc`.
  """
  return unipc(schedule, 2, variant=variant)


@registry.register("samplers.solvers", "unipc3", timesteps=time_grids.karras_timesteps)
def unipc3(schedule: NoiseSchedule, variant: Variant = "bh2") -> SolverTableau:
  """UniPC of order 3 (see `unipc`).

  Args:
    schedule: the noise level at each step.
    variant: see `unipc`.
  """
  return unipc(schedule, 3, variant=variant)


@fields.checked
def unipc(
  schedule: NoiseSchedule,
  order: Annotated[int, Range(1, 3)] = 2,
  *,
  variant: Variant = "bh2",
  lower_order_final: bool = True,
) -> SolverTableau:
  """UniPC in x0, as diffusers' UniPCMultistepScheduler runs it.

  The first steps have the order that their history allows. The last state is predicted,
  not corrected.

  Args:
    schedule: the noise level at each step; every step starts where the last one ends.
    order: of the predictor, 1 to 3; the corrector raises it by one.
    variant: B(h) = h ("bh1") or e^h - 1 ("bh2"); bh2 is better with few steps.
    lower_order_final: whether the last steps have orders ..., 2, 1. A step to clean data
      is of first order in any case.

  Raises:
    ValueError: an order or a variant that does not exist.

  Example:
    >>> from sdiff_jax.diffusion import noise_schedules
    >>> schedule = noise_schedules.edm(np.geomspace(20, 0.1, 9))
    >>> unipc(schedule, order=3).denoised_coef.shape
    (8, 4)
  """
  with np.errstate(divide="ignore"):
    log_snr = np.log(schedule.alpha) - np.log(schedule.sigma)
    log_snr_end = np.log(schedule.alpha_next[-1]) - np.log(schedule.sigma_next[-1])
  grid = np.append(log_snr, log_snr_end)
  num_steps, correction, steps = len(log_snr), np.zeros(order + 1), []
  for i in range(num_steps):
    max_order = num_steps - i if lower_order_final else order
    if schedule.sigma_next[i] == 0:
      max_order = 1
    now = min(order, max_order, i + 1)
    ratio = schedule.sigma_next[i] / schedule.sigma[i]
    predictor, corrector = _weights(grid[: i + 2], now, variant)
    predictor, corrector = (
      schedule.alpha_next[i] * np.pad(w, (0, order + 1 - len(w)))
      for w in (predictor, corrector)
    )
    # x_{i+1} = S_i (x_i + sum_n correction_n m_{i-n}) + sum_n P_in m_{i-n}
    steps.append(SolverStep(i, [ratio], ratio * correction + predictor))
    # x^c_{i+1} - x_{i+1} in terms of m_{i+1}, m_i, ...
    correction = corrector - np.append(0.0, predictor[:-1])
  return tableau.assemble(schedule, steps)


def _weights(
  log_snr: np.ndarray, order: int, variant: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the weights of a step's predictor and of its corrector, over alpha'.

  Args:
    log_snr: ln(alpha / sigma) at all states up to the end of the step.
    order: p of this step.
    variant: as in `unipc`.

  Returns:
    Weights of m_i, ..., m_{i-p+1} in the predictor [p], and of m_{i+1}, m_i, ...,
    m_{i-p+1} in the corrector [p + 1].
  """
  h = log_snr[-1] - log_snr[-2]
  first = -np.expm1(-h)  # 1 - e^-h, the weight of m_i at first order
  predictor = np.append(first, np.zeros(order - 1))
  corrector = np.append([0.0, first], np.zeros(order - 1))
  if not np.isfinite(h):  # a step to clean data is not corrected
    return predictor, corrector
  r = np.append((log_snr[-3 : -2 - order : -1] - log_snr[-2]) / h, 1.0)
  B = -h if variant == "bh1" else np.expm1(-h)
  powers = r[None] ** np.arange(order)[:, None]
  moments = _moments(h, order) / B
  # Section 3.2: at order 1 of the corrector and 2 of the predictor, rho is 1/2.
  rho_p = np.full(1, 0.5)[: order - 1]
  if order > 2:
    rho_p = np.linalg.solve(powers[:-1, :-1], moments[:-1])
  rho_c = np.linalg.solve(powers, moments) if order > 1 else np.full(1, 0.5)
  # x' = ... - alpha' B sum_k rho_k (m_k - m_i) / r_k
  for weights, rho, past in ((predictor, rho_p, 0), (corrector, rho_c[:-1], 1)):
    weight = -B * rho / r[:-1]
    weights[past + 1 :] += weight
    weights[past] -= weight.sum()
  corrector[0] -= B * rho_c[-1]
  corrector[1] += B * rho_c[-1]
  return predictor, corrector


def _moments(h: float, order: int) -> np.ndarray:
  """Returns k! phi_{k+1}(-h) (-h) for k = 1 to order, where phi_1(z) = (e^z - 1) / z."""
  moments, phi, factorial = [], np.expm1(-h) / -h - 1, 1
  for k in range(1, order + 1):
    moments.append(phi * factorial)
    factorial *= k + 1
    phi = phi / -h - 1 / factorial
  return np.array(moments)
