"""Solvers of the reverse process, as tables of coefficients.

Row i of a table takes state x_i to x_{i+1} with one evaluation of the denoiser,

    x_{i+1} = a_i x_i + p_i x_{i-1} + b_i d_i + c_i d_{i-1} + s_i z_i,
    d_i = denoiser(x_i, time_i),    z_i ~ N(0, I),

so a table says all that there is to say of a solver, and any loop over rows can run
it. Tables are made once, on the host, in float64, from a `Path`. A solver with two
evaluations a step has two rows a step.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sdiff_jax import times

HEUN_MAX = 1000.0  # sigma / alpha; EDM starts at 80


class Path(NamedTuple):
  """A process x = alpha x0 + sigma eps on a falling grid of N + 1 points.

  Attributes:
    alpha: float64 [N + 1].
    sigma: float64 [N + 1], the last one 0.
    time: what the denoiser is told at each point, float64 [N + 1].
    point: ln(alpha / sigma) -> (alpha, sigma, time) between the points of the grid.
  """

  alpha: np.ndarray
  sigma: np.ndarray
  time: np.ndarray
  point: Callable[[float], tuple[float, float, float]]


class Table(NamedTuple):
  """Coefficients [R] of the recurrence above, time [R], and the first state's std."""

  a: np.ndarray
  p: np.ndarray
  b: np.ndarray
  c: np.ndarray
  s: np.ndarray
  time: np.ndarray
  init_std: float

  @property
  def evaluations(self) -> int:
    return len(self.time)


def trigflow_path(angles: np.ndarray, sigma_d: float) -> Path:
  """Returns the path x_t = cos(t) x0 + sin(t) sigma_d eps, with time t.

  Args:
    angles: falling, float64 [N + 1], the last one 0.
    sigma_d: standard deviation of the data.
  """

  def point(log_snr: float) -> tuple[float, float, float]:
    t = np.arctan(np.exp(-log_snr) / sigma_d)
    return np.cos(t), sigma_d * np.sin(t), t

  return Path(np.cos(angles), sigma_d * np.sin(angles), angles, point)


def edm_path(sigmas: np.ndarray) -> Path:
  """Returns the variance-exploding path x = x0 + sigma eps, with time sigma.

  Args:
    sigmas: falling noise levels, float64 [N + 1], the last one 0.
  """

  def point(log_snr: float) -> tuple[float, float, float]:
    sigma = np.exp(-log_snr)
    return 1.0, sigma, sigma

  return Path(np.ones_like(sigmas), sigmas, sigmas, point)


def _assemble(rows: list[dict[str, float]], path: Path) -> Table:
  names = Table._fields[:-1]
  columns = {n: np.array([row.get(n, 0.0) for row in rows], np.float64) for n in names}
  return Table(**columns, init_std=float(path.sigma[0]))


def ddim(path: Path) -> Table:
  """x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) d (arXiv:2010.02502).

  On the TrigFlow path it is the rotation of arXiv:2410.11081, section 3; on EDM's,
  Euler's method.
  """
  rows = []
  for i in range(len(path.time) - 1):
    ratio = path.sigma[i + 1] / path.sigma[i]
    b = path.alpha[i + 1] - path.alpha[i] * ratio
    rows.append({"a": ratio, "b": b, "time": path.time[i]})
  return _assemble(rows, path)


def heun(path: Path) -> Table:
  """EDM's second-order solver (arXiv:2206.00364, algorithm 1 without churn).

  Euler to the next noise level, then the mean of both noise predictions from the
  start; the last step, to noise 0, is Euler's alone: 2 N - 1 evaluations. Written
  for y = x / alpha at noise s = sigma / alpha, then scaled back by alpha.

  Raises:
    ValueError: the noise starts above HEUN_MAX, where steps in s are useless.
  """
  rows, noise = [], path.sigma / path.alpha
  if noise[0] > HEUN_MAX:
    raise ValueError(
      f"sampler.angles: heun cannot start at noise {noise[0]:.4g} (pi/2 is infinite); "
      f"start below {HEUN_MAX:g}, or take dpm2s or ddim"
    )
  for i in range(len(path.time) - 1):
    s, s_next, h = noise[i], noise[i + 1], noise[i + 1] - noise[i]
    gain = path.alpha[i + 1] / path.alpha[i]
    euler = {"a": gain * (1 + h / s), "b": -path.alpha[i + 1] * h / s}
    rows.append(euler | {"time": path.time[i]})
    if s_next == 0:
      continue
    correct = {"p": gain * (1 + h / (2 * s)), "c": -path.alpha[i + 1] * h / (2 * s)}
    correct |= {"a": h / (2 * s_next), "b": -path.alpha[i + 1] * h / (2 * s_next)}
    rows.append(correct | {"time": path.time[i + 1]})
  return _assemble(rows, path)


def dpm2s(path: Path) -> Table:
  """DPM-Solver++(2S) with r = 1/2 (arXiv:2211.01095, algorithm 1).

  DDIM to the midpoint in ln(alpha / sigma), then DDIM over the whole step with the
  midpoint's d; the last step, to noise 0, is DDIM's alone: 2 N - 1 evaluations.
  """
  rows = []
  for i in range(len(path.time) - 1):
    alpha, sigma, time = path.alpha[i], path.sigma[i], path.time[i]
    alpha_1, sigma_1 = path.alpha[i + 1], path.sigma[i + 1]
    whole = alpha_1 - alpha * sigma_1 / sigma
    if sigma_1 == 0:
      rows.append({"a": 0.0, "b": whole, "time": time})
      continue
    middle = (np.log(alpha / sigma) + np.log(alpha_1 / sigma_1)) / 2
    alpha_m, sigma_m, time_m = path.point(middle)
    half = alpha_m - alpha * sigma_m / sigma
    rows.append({"a": sigma_m / sigma, "b": half, "time": time})
    rows.append({"p": sigma_1 / sigma, "b": whole, "time": time_m})
  return _assemble(rows, path)


def consistency(path: Path) -> Table:
  """x' = alpha' d + sigma' z: jump to data, add fresh noise, again.

  The sampler of consistency models (arXiv:2303.01469, algorithm 1), with d = f.
  """
  rows = [
    {"b": path.alpha[i + 1], "s": path.sigma[i + 1], "time": path.time[i]}
    for i in range(len(path.time) - 1)
  ]
  return _assemble(rows, path)


# name -> (solver, angles for a number of steps)
SOLVERS: dict[str, tuple[Callable[[Path], Table], Callable[..., np.ndarray]]] = {
  "ddim": (ddim, times.karras_angles),
  "heun": (heun, times.karras_angles),
  "dpm2s": (dpm2s, times.karras_angles),
  "consistency": (consistency, times.consistency_angles),
}


def build(
  *, sigma_d: float, name: str, steps: int, angles: tuple[float, ...] = ()
) -> Table:
  """Returns the table of a named solver on the TrigFlow path.

  Args:
    sigma_d: standard deviation of the data.
    name: a key of SOLVERS.
    steps: number of steps (heun and dpm2s evaluate 2 steps - 1 times).
    angles: the starting angle of every step, instead of the solver's own grid.

  Raises:
    ValueError: an unknown name, steps below 1, or angles that do not fall.
  """
  if name not in SOLVERS:
    raise ValueError(f"sampler.name={name!r}: take one of {[*SOLVERS]}")
  if steps < 1:
    raise ValueError(f"sampler.steps={steps}: take 1 or more")
  solver, grid = SOLVERS[name]
  t = times.given_angles(angles) if angles else grid(steps, sigma_d)
  return solver(trigflow_path(t, sigma_d))
