"""Noise schedules of the reverse process: the noise levels of a solver's steps.

A diffusion process is x = alpha x0 + sigma eps, eps ~ N(0, I). A schedule lists, for
each step of a solver, alpha and sigma at its start, the time that the denoiser is given
there, and alpha and sigma at its end. Arrays are float64, on the host.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# ln(alpha / sigma) -> (alpha, sigma, time)
PointFn = Callable[[float], tuple[float, float, float]]
MIN_LOG_SNR = (
  -60.0
)  # of a time that is pure noise, where ln(alpha / sigma) is -infinity


class NoiseSchedule(NamedTuple):
  """N steps of a diffusion process x = alpha x0 + sigma eps.

  Attributes:
    alpha: at the start of each step, float64 [N].
    sigma: at the start of each step, float64 [N].
    time: the denoiser's time argument at the start of each step, float64 [N].
    alpha_next: at the end of each step, float64 [N].
    sigma_next: at the end of each step, float64 [N]; the last one is 0, or small.
    point: ln(alpha / sigma) -> (alpha, sigma, time) anywhere on the process, for
      solvers that evaluate inside a step.
    sigma_d: standard deviation of the data, approximately; parallel samplers use it for
      first guesses.
  """

  alpha: np.ndarray
  sigma: np.ndarray
  time: np.ndarray
  alpha_next: np.ndarray
  sigma_next: np.ndarray
  point: PointFn
  sigma_d: float

  def last(self, steps: int) -> "NoiseSchedule":
    """Returns the schedule of the last steps alone.

    Args:
      steps: how many, 1 to N.

    Example:
      >>> flow(np.array([0.75, 0.5, 0.0])).last(1).time
      array([0.5])
    """
    return self._replace(
      alpha=self.alpha[-steps:],
      sigma=self.sigma[-steps:],
      time=self.time[-steps:],
      alpha_next=self.alpha_next[-steps:],
      sigma_next=self.sigma_next[-steps:],
    )


def from_levels(
  alpha: np.ndarray,
  sigma: np.ndarray,
  time: np.ndarray,
  point: PointFn,
  sigma_d: float,
) -> NoiseSchedule:
  """Returns the schedule whose N steps connect N + 1 points of a process.

  Args:
    alpha: at each point, float64 [N + 1].
    sigma: at each point, decreasing, float64 [N + 1].
    time: the denoiser's time argument at each point, float64 [N + 1].
    point: see `NoiseSchedule`.
    sigma_d: standard deviation of the data.

  Example:
    >>> sigma = np.array([2.0, 1.0, 0.0])
    >>> point = lambda log_snr: (1.0, np.exp(-log_snr), np.exp(-log_snr))
    >>> from_levels(np.ones(3), sigma, sigma, point, sigma_d=0.5).sigma_next
    array([1., 0.])
  """
  ends = alpha[1:], sigma[1:]
  return NoiseSchedule(alpha[:-1], sigma[:-1], time[:-1], *ends, point, sigma_d)


def trigflow(timesteps: np.ndarray, sigma_d: float) -> NoiseSchedule:
  """Returns the schedule of TrigFlow, x_t = cos(t) x0 + sin(t) sigma_d eps, at times t.

  Args:
    timesteps: times, decreasing to 0, float64 [N + 1].
    sigma_d: standard deviation of the data.

  Example:
    >>> trigflow(np.array([1.5, 0.5, 0.0]), sigma_d=0.5).sigma.round(3)
    array([0.499, 0.24 ])
  """

  def point(log_snr: float) -> tuple[float, float, float]:
    t = np.arctan(np.exp(-log_snr) / sigma_d)
    return np.cos(t), sigma_d * np.sin(t), t

  alpha, sigma = np.cos(timesteps), sigma_d * np.sin(timesteps)
  return from_levels(alpha, sigma, timesteps, point, sigma_d)


def edm(sigmas: np.ndarray, sigma_d: float = 0.5) -> NoiseSchedule:
  """Returns the schedule of EDM, x = x0 + sigma eps, with time sigma.

  Args:
    sigmas: noise levels, decreasing to 0, float64 [N + 1].
    sigma_d: standard deviation of the data.

  Example:
    >>> from sdiff_jax.diffusion import time_grids
    >>> edm(time_grids.karras(18)).time[0].round(6)
    np.float64(80.0)
  """

  def point(log_snr: float) -> tuple[float, float, float]:
    sigma = np.exp(-log_snr)
    return 1.0, sigma, sigma

  return from_levels(np.ones_like(sigmas), sigmas, sigmas, point, sigma_d)


def flow(times: np.ndarray, sigma_d: float = 1.0) -> NoiseSchedule:
  """Returns the schedule of rectified flow, x = (1 - t) x0 + t eps, with time t.

  Args:
    times: decreasing to 0, in [0, 1], float64 [N + 1].
    sigma_d: standard deviation of the data.

  Example:
    >>> schedule = flow(np.array([0.75, 0.5, 0.0]))
    >>> schedule.alpha, schedule.sigma_next
    (array([0.25, 0.5 ]), array([0.5, 0. ]))
  """

  def point(log_snr: float) -> tuple[float, float, float]:
    t = 1 / (1 + np.exp(log_snr))
    return 1 - t, t, t

  return from_levels(1 - times, times, times, point, sigma_d)


def alphas_cumprod(
  schedule: str, steps: int, *, start: float = 1e-4, end: float = 0.02
) -> np.ndarray:
  """Returns abar_t = alpha_t^2 of a discrete variance-preserving process.

  abar_t is the product of 1 - beta_u over u <= t.

  Args:
    schedule: "linear" in beta (DDPM), "scaled_linear" for a linear square root of beta
      (Stable Diffusion), or "cosine", which is squaredcos_cap_v2 (arXiv:2102.09672, eq.
      17).
    steps: number of training steps T.
    start: the first beta; unused by "cosine".
    end: the last beta; unused by "cosine".

  Returns:
    abar, float64 [T].

  Raises:
    ValueError: an unknown schedule.

  Example:
    >>> alphas_cumprod("linear", 1000)[[0, -1]].round(4).tolist()
    [0.9999, 0.0]
  """
  if schedule == "linear":
    betas = np.linspace(start, end, steps)
  elif schedule == "scaled_linear":
    betas = np.linspace(start**0.5, end**0.5, steps) ** 2
  elif schedule == "cosine":
    at = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - at[1:] / at[:-1], 0.999)
  else:
    raise ValueError(
      f"schedule={schedule!r}: must be 'linear', 'scaled_linear' or 'cosine'"
    )
  return np.cumprod(1 - betas)


def timesteps(
  train_steps: int, steps: int, spacing: str, offset: int = 0
) -> np.ndarray:
  """Returns the timesteps of a DDPM or DDIM sampler, in decreasing order.

  Args:
    train_steps: number of training steps T.
    steps: number of sampling steps N, at most T.
    spacing: "leading", multiples of T // N; "trailing", down from T - 1 by T / N; or
      "linspace", from T - 1 to 0 (arXiv:2305.08891, table 2).
    offset: added to "leading" timesteps.

  Returns:
    Timesteps, int [N].

  Raises:
    ValueError: an unknown spacing, or more steps than the process has.

  Example:
    >>> timesteps(1000, 4, "trailing")
    array([999, 749, 499, 249])
  """
  if not 1 <= steps <= train_steps:
    raise ValueError(f"steps={steps}: must be in 1 to {train_steps}")
  if spacing == "leading":
    return np.arange(steps)[::-1] * (train_steps // steps) + offset
  if spacing == "trailing":
    down = np.arange(train_steps, 0, -train_steps / steps)[:steps]
    return np.round(down).astype(int) - 1
  if spacing == "linspace":
    return np.round(np.linspace(0, train_steps - 1, steps))[::-1].astype(int)
  raise ValueError(f"spacing={spacing!r}: must be 'leading', 'trailing' or 'linspace'")


def vp(
  abar: np.ndarray,
  starts: np.ndarray,
  *,
  ends: np.ndarray | None = None,
  final_abar: float = 1.0,
) -> NoiseSchedule:
  """Returns the schedule of a discrete variance-preserving process, with time t.

  Args:
    abar: alpha^2 at each training timestep, float64 [T].
    starts: timestep at the start of each step, decreasing, int [N].
    ends: timestep at the end of each step, negative for the end of the process; None
      for the start of the next step. Some samplers step to t - T // N, which differs
      from the next timestep where N does not divide T.
    final_abar: abar at the end of the process; 1 is clean data.

  Example:
    >>> abar = alphas_cumprod("cosine", 100)
    >>> vp(abar, timesteps(100, 4, "leading")).time
    array([75., 50., 25.,  0.])
  """
  ends = np.append(starts[1:], -1) if ends is None else ends
  next_abar = np.where(ends < 0, final_abar, abar[np.maximum(ends, 0)])
  return NoiseSchedule(
    abar[starts] ** 0.5,
    (1 - abar[starts]) ** 0.5,
    starts.astype(np.float64),
    next_abar**0.5,
    (1 - next_abar) ** 0.5,
    _vp_point(abar),
    sigma_d=1.0,
  )


def vp_by_sigma(abar: np.ndarray, starts: np.ndarray) -> NoiseSchedule:
  """Returns the schedule of a discrete variance-preserving process at any times.

  Between two timesteps sigma / alpha is linear in time, as in Euler's method of
  k-diffusion and diffusers. The last step ends at clean data.

  Args:
    abar: alpha^2 at each training timestep, all above 0, float64 [T].
    starts: time at the start of each step, decreasing, in [0, T - 1]; a larger time has
      the noise level of T - 1. float64 [N].

  Example:
    >>> abar = alphas_cumprod("cosine", 100)
    >>> vp_by_sigma(abar, np.linspace(99, 0, 3)).time
    array([99. , 49.5,  0. ])
  """
  ratio = np.interp(starts, np.arange(len(abar)), (1 / abar - 1) ** 0.5)
  ratio = np.append(ratio, 0.0)
  alpha = (1 + ratio**2) ** -0.5
  return from_levels(
    alpha, ratio * alpha, np.append(starts, 0.0), _vp_point(abar), sigma_d=1.0
  )


def vp_of_ratios(abar: np.ndarray, ratios: np.ndarray) -> NoiseSchedule:
  """Returns the schedule of a discrete variance-preserving process at any noise levels.

  Between two timesteps ln(alpha / sigma) is linear in time, as in `parameterizations.vp`.

  Args:
    abar: alpha^2 at each training timestep, all above 0, float64 [T].
    ratios: sigma / alpha at the start of each step and at the end, decreasing; the last
      one may be 0. float64 [N + 1].

  Example:
    >>> abar = np.array([0.8, 0.5, 0.2])  # of sigma / alpha = 1/2, 1 and 2
    >>> vp_of_ratios(abar, np.array([2.0, 2**-0.5, 0.0])).time
    array([2. , 0.5])
  """
  with np.errstate(divide="ignore"):
    time = np.interp(np.log(ratios), -log_snr(abar), np.arange(len(abar)))
  alpha = (1 + ratios**2) ** -0.5
  return from_levels(alpha, ratios * alpha, time, _vp_point(abar), sigma_d=1.0)


def _vp_point(abar: np.ndarray) -> PointFn:
  """Returns `NoiseSchedule.point` of a discrete variance-preserving process."""
  log_snrs = log_snr(abar)

  def point(log_snr: float) -> tuple[float, float, float]:
    alpha = (1 + np.exp(-2 * log_snr)) ** -0.5
    t = np.interp(-log_snr, -log_snrs, np.arange(len(abar)))
    return alpha, (1 - alpha**2) ** 0.5, t

  return point


def log_snr(abar: np.ndarray) -> np.ndarray:
  """Returns ln(alpha / sigma), which is finite at the end of a zero terminal SNR.

  Args:
    abar: alpha^2, in [0, 1), float64 [T]. Where it is 0, the value is `MIN_LOG_SNR`.

  Example:
    >>> log_snr(np.array([0.5, 0.0]))
    array([  0., -60.])
  """
  with np.errstate(divide="ignore"):
    return np.maximum(np.log(abar / (1 - abar)) / 2, MIN_LOG_SNR)


def rescale_zero_terminal_snr(abar: np.ndarray) -> np.ndarray:
  """Returns alpha^2 of the process whose last timestep is pure noise, float64 [T].

  alpha is shifted so that it ends at 0, and scaled so that it begins where it did
  (arXiv:2305.08891, algorithm 1).

  Args:
    abar: alpha^2 at each training timestep, float64 [T].

  Example:
    >>> rescale_zero_terminal_snr(np.array([0.81, 0.25, 0.09])).round(4).tolist()
    [0.81, 0.09, 0.0]
  """
  alpha = abar**0.5
  return ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2
