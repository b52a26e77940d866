"""Paths of the reverse process: noise levels from step to step.

A process is x = alpha x0 + sigma eps. A path lists, for each step of a solver, the
alpha and sigma where it starts, what the denoiser is told there, and the alpha and
sigma where it ends; all in float64, on the host.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class NoiseSchedule(NamedTuple):
  """N steps of a process.

  Attributes:
    alpha: at the start of each step, float64 [N].
    sigma: at the start of each step, float64 [N].
    time: what the denoiser is told at each start, float64 [N].
    alpha_next: at the end of each step, float64 [N].
    sigma_next: at the end of each step, float64 [N]; the last one is 0, or small.
    point: ln(alpha / sigma) -> (alpha, sigma, time) anywhere on the process.
    sigma_d: standard deviation of the data, about; parallel samplers guess with it.
  """

  alpha: np.ndarray
  sigma: np.ndarray
  time: np.ndarray
  alpha_next: np.ndarray
  sigma_next: np.ndarray
  point: Callable[[float], tuple[float, float, float]]
  sigma_d: float


def from_levels(
  alpha: np.ndarray,
  sigma: np.ndarray,
  time: np.ndarray,
  point: Callable[[float], tuple[float, float, float]],
  sigma_d: float,
) -> NoiseSchedule:
  """Returns the path whose steps join the N + 1 points that are given."""
  ends = alpha[1:], sigma[1:]
  return NoiseSchedule(alpha[:-1], sigma[:-1], time[:-1], *ends, point, sigma_d)


def trigflow(angles: np.ndarray, sigma_d: float) -> NoiseSchedule:
  """Returns the path x_t = cos(t) x0 + sin(t) sigma_d eps, with time t.

  Args:
    angles: falling, float64 [N + 1], the last one 0.
    sigma_d: standard deviation of the data.
  """

  def point(log_snr: float) -> tuple[float, float, float]:
    t = np.arctan(np.exp(-log_snr) / sigma_d)
    return np.cos(t), sigma_d * np.sin(t), t

  return from_levels(np.cos(angles), sigma_d * np.sin(angles), angles, point, sigma_d)


def edm(sigmas: np.ndarray, sigma_d: float = 0.5) -> NoiseSchedule:
  """Returns the variance-exploding path x = x0 + sigma eps, with time sigma.

  Args:
    sigmas: falling noise levels, float64 [N + 1], the last one 0.
    sigma_d: standard deviation of the data.
  """

  def point(log_snr: float) -> tuple[float, float, float]:
    sigma = np.exp(-log_snr)
    return 1.0, sigma, sigma

  return from_levels(np.ones_like(sigmas), sigmas, sigmas, point, sigma_d)


def flow(times: np.ndarray, sigma_d: float = 1.0) -> NoiseSchedule:
  """Returns the path of rectified flow, x = (1 - t) x0 + t eps, with time t.

  Args:
    times: falling in [0, 1], float64 [N + 1], the last one 0.
    sigma_d: standard deviation of the data.
  """

  def point(log_snr: float) -> tuple[float, float, float]:
    t = 1 / (1 + np.exp(log_snr))
    return 1 - t, t, t

  return from_levels(1 - times, times, times, point, sigma_d)


def alphas_cumprod(
  schedule: str, steps: int, *, start: float = 1e-4, end: float = 0.02
) -> np.ndarray:
  """Returns abar_t = alpha_t^2 of a variance-preserving process, float64 [steps].

  abar_t is the product of 1 - beta_u over u <= t.

  Args:
    schedule: "linear" in beta (DDPM), "scaled_linear", linear in its root (Stable
      Diffusion), or "cosine", squaredcos_cap_v2 (arXiv:2102.09672, eq. 17).
    steps: training steps T.
    start: the first beta; unused by "cosine".
    end: the last beta; unused by "cosine".

  Raises:
    ValueError: an unknown schedule.
  """
  if schedule == "linear":
    betas = np.linspace(start, end, steps)
  elif schedule == "scaled_linear":
    betas = np.linspace(start**0.5, end**0.5, steps) ** 2
  elif schedule == "cosine":
    at = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - at[1:] / at[:-1], 0.999)
  else:
    raise ValueError(f"schedule={schedule!r}: take 'linear', 'scaled_linear', 'cosine'")
  return np.cumprod(1 - betas)


def timesteps(
  train_steps: int, steps: int, spacing: str, offset: int = 0
) -> np.ndarray:
  """Returns the falling timesteps of a DDPM or DDIM sampler, int [steps].

  Args:
    train_steps: T.
    steps: N, at most T.
    spacing: "leading", multiples of T // N; "trailing", down from T - 1 by T / N;
      "linspace", from T - 1 to 0 (arXiv:2305.08891, table 2).
    offset: added to "leading" timesteps.

  Raises:
    ValueError: an unknown spacing, or more steps than the process has.
  """
  if not 1 <= steps <= train_steps:
    raise ValueError(f"steps={steps}: take 1 to {train_steps}")
  if spacing == "leading":
    return np.arange(steps)[::-1] * (train_steps // steps) + offset
  if spacing == "trailing":
    down = np.arange(train_steps, 0, -train_steps / steps)[:steps]
    return np.round(down).astype(int) - 1
  if spacing == "linspace":
    return np.round(np.linspace(0, train_steps - 1, steps))[::-1].astype(int)
  raise ValueError(f"spacing={spacing!r}: take 'leading', 'trailing' or 'linspace'")


def vp(
  abar: np.ndarray,
  at: np.ndarray,
  *,
  ends: np.ndarray | None = None,
  last: float = 1.0,
) -> NoiseSchedule:
  """Returns the path of a discrete variance-preserving process, with time t.

  Args:
    abar: alpha^2 at each timestep, float64 [T].
    at: falling timesteps, int [N].
    ends: timestep at the end of each step, below 0 for the end of the process; None
      for the next of `at`. Some samplers go to t - T // N, which is another one where
      N does not divide T.
    last: abar at the end of the process; 1 is clean data.
  """
  ends = np.append(at[1:], -1) if ends is None else ends
  next_abar = np.where(ends < 0, last, abar[np.maximum(ends, 0)])
  log_snrs = np.log(abar / (1 - abar)) / 2

  def point(log_snr: float) -> tuple[float, float, float]:
    alpha = (1 + np.exp(-2 * log_snr)) ** -0.5
    t = np.interp(-log_snr, -log_snrs, np.arange(len(abar)))
    return alpha, (1 - alpha**2) ** 0.5, t

  return NoiseSchedule(
    abar[at] ** 0.5,
    (1 - abar[at]) ** 0.5,
    at.astype(np.float64),
    next_abar**0.5,
    (1 - next_abar) ** 0.5,
    point,
    sigma_d=1.0,
  )
