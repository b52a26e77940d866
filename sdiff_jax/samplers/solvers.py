"""Solvers of the reverse process, as tables of coefficients.

Row i of a table takes state x_i to x_{i+1} with one evaluation of the denoiser,

    x_{i+1} = a_i x_i + p_i x_{i-1} + b_i d_i + c_i d_{i-1} + e_i d_{i-2} + s_i z_i,
    d_i = denoiser(x_i, time_i),    z_i ~ N(0, I),

so a table says all that there is to say of a solver, and any loop over rows can run
it. Tables are made once, on the host, in float64, from a `Path`. A solver with two
evaluations a step has two rows a step.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sdiff_jax.diffusion import noise_schedules, time_grids
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule

HEUN_MAX = 1000.0  # sigma / alpha; EDM starts at 80


# Of the data's standard deviation: the unit of errors, about the noise of a step of
# DDPM with 100 steps, so that 0.1 is a usual tolerance.
TOLERANCE_UNIT = 0.1


class SolverTableau(NamedTuple):
  """Coefficients of the recurrence above, and what else its rows know, float64 [R].

  Attributes:
    alpha: of the state that a row starts from: 0 <= dd/dx <= 1 / alpha for a true
      denoiser.
    gain: dd/dx where the data are Gaussian, of the path's standard deviation: a guess.
    scale: standard deviation of x' given x and x0 in the row's step, the unit of
      errors of its state; 0 in a step to clean data.
    init_std: the first state's standard deviation.
    sigma_d: the data's, about.
  """

  a: np.ndarray
  p: np.ndarray
  b: np.ndarray
  c: np.ndarray
  e: np.ndarray
  s: np.ndarray
  time: np.ndarray
  alpha: np.ndarray
  gain: np.ndarray
  scale: np.ndarray
  init_std: float
  sigma_d: float

  @property
  def evaluations(self) -> int:
    return len(self.time)

  def uses(self, *columns: str) -> bool:
    """Returns whether one of the columns is not all zeros."""
    return any(getattr(self, name).any() for name in columns)


def _posterior_std(path: NoiseSchedule) -> np.ndarray:
  """Returns sigma' (1 - (alpha sigma' / (alpha' sigma))^2)^(1/2), float64 [N].

  That of x' given x and x0, the noise of DDPM (arXiv:2006.11239, eq. 7).
  """
  ratio = path.alpha * path.sigma_next / (path.alpha_next * path.sigma)
  return path.sigma_next * (1 - ratio**2) ** 0.5


def _assemble(rows: list[dict[str, float]], path: NoiseSchedule) -> SolverTableau:
  """Returns the table of rows; each names its step, and its point if inside."""
  names = SolverTableau._fields[:7]
  columns = {n: np.array([row.get(n, 0.0) for row in rows], np.float64) for n in names}
  step = [row["step"] for row in rows]
  ends = [(path.alpha[i], path.sigma[i]) for i in step]
  points = [row.get("point", end) for row, end in zip(rows, ends, strict=True)]
  alpha, sigma = np.array(points).T
  return SolverTableau(
    **columns,
    alpha=alpha,
    gain=alpha * path.sigma_d**2 / ((alpha * path.sigma_d) ** 2 + sigma**2),
    scale=_posterior_std(path)[step],
    init_std=float(path.sigma[0]),
    sigma_d=path.sigma_d,
  )


def _rows(columns: dict[str, np.ndarray]) -> list[dict[str, float]]:
  """Returns the rows of a solver with one evaluation a step."""
  values = zip(*columns.values(), strict=True)
  return [
    dict(zip(columns, v, strict=True)) | {"step": i} for i, v in enumerate(values)
  ]


def ddim(path: NoiseSchedule, eta: float = 0.0) -> SolverTableau:
  """x' = alpha' d + (sigma'^2 - s^2)^(1/2) (x - alpha d) / sigma + s z.

  s^2 = eta^2 sigma'^2 (1 - (alpha sigma' / (alpha' sigma))^2) (arXiv:2010.02502, eq.
  12 and 16). With eta = 0 it is the rotation of arXiv:2410.11081, section 3, on the
  TrigFlow path, and Euler's method on EDM's and on rectified flow's.

  Args:
    path: the steps.
    eta: share of the noise of DDPM's posterior; 0 is an ODE, 1 is DDPM.
  """
  s = eta * _posterior_std(path)
  a = (path.sigma_next**2 - s**2) ** 0.5 / path.sigma
  columns = {"a": a, "b": path.alpha_next - path.alpha * a, "s": s, "time": path.time}
  return _assemble(_rows(columns), path)


def ddpm(path: NoiseSchedule, variance: str = "small") -> SolverTableau:
  """Ancestral sampling: x' ~ N(E[x' | x, x0 = d], s^2) (arXiv:2006.11239, eq. 6-7).

  Args:
    path: the steps.
    variance: "small", that of the posterior, or "large", beta = sigma^2 - (alpha
      sigma' / alpha')^2 (section 3.2); none in a step to clean data.

  Raises:
    ValueError: another variance.
  """
  table = ddim(path, eta=1.0)
  if variance == "small":
    return table
  if variance != "large":
    raise ValueError(f"variance={variance!r}: take 'small' or 'large'")
  beta = path.sigma**2 - (path.alpha * path.sigma_next / path.alpha_next) ** 2
  return table._replace(s=np.where(path.sigma_next > 0, beta**0.5, 0.0))


def dpmpp(path: NoiseSchedule, order: int = 2, *, sde: bool = False) -> SolverTableau:
  """DPM-Solver++ multistep in x0 (arXiv:2211.01095, algorithm 2 and appendix B).

  With l = ln(alpha / sigma), h = l' - l: first order is DDIM's step; the others add
  differences of the d before. The first steps have the order that their history
  allows; a step to clean data is of first order, and so are, of fewer than 15 steps,
  the last (the one before it of second), where higher orders overshoot. 3M is as its
  authors run it: its second difference has half the weight of a third order.

  Args:
    path: the steps, joined.
    order: 1, 2 (2M, midpoint) or 3 (3M).
    sde: solve the reverse SDE instead: noise in every step; order 1 or 2.

  Raises:
    ValueError: an order that does not exist.
  """
  if order not in ((1, 2) if sde else (1, 2, 3)):
    raise ValueError(f"order={order}: DPM-Solver++ has 1, 2 and 3, its SDE 1 and 2")
  with np.errstate(divide="ignore"):
    here, there = (
      np.log(alpha) - np.log(sigma)
      for alpha, sigma in ((path.alpha, path.sigma), (path.alpha_next, path.sigma_next))
    )
  steps, h, rows = len(here), there - here, []
  for i in range(steps):
    most = steps - i if steps < 15 else order
    if path.sigma_next[i] == 0 or h[i] == 0:
      most = 1
    b, c, e = _differences(h[: i + 1], min(order, most, i + 1), sde)
    ratio, gain = path.sigma_next[i] / path.sigma[i], path.alpha_next[i]
    row = {"b": gain * b, "c": gain * c, "e": gain * e, "time": path.time[i], "step": i}
    row["a"] = ratio * (np.exp(-h[i]) if sde else 1.0)
    row["s"] = path.sigma_next[i] * (-np.expm1(-2 * h[i])) ** 0.5 if sde else 0.0
    rows.append(row)
  return _assemble(rows, path)


def _differences(h: np.ndarray, order: int, sde: bool) -> tuple[float, float, float]:
  """Returns the weights of d, of the one before and of the one before that.

  Args:
    h: steps in ln(alpha / sigma) up to this one, the last of the array.
    order: of this step.
    sde: as in `dpmpp`.
  """
  one = -np.expm1(-(1 + sde) * h[-1])  # 1 - e^-h
  if order == 1:
    return one, 0.0, 0.0
  r = h[-2] / h[-1]
  if order == 2:
    half = one / (2 * r)
    return one + half, -half, 0.0
  r_1 = h[-3] / h[-1]
  # Weights of the first and second difference, and those in terms of d.
  first = 1 - one / h[-1]
  second = (h[-1] - one) / h[-1] ** 2 - 0.5
  D_1_0, D_1_1 = np.array([1, -1, 0]) / r, np.array([0, 1, -1]) / r_1
  D_1 = D_1_0 + r / (r + r_1) * (D_1_0 - D_1_1)
  D_2 = (D_1_0 - D_1_1) / (r + r_1)
  return tuple(np.array([one, 0, 0]) + first * D_1 - second * D_2)


def heun(path: NoiseSchedule) -> SolverTableau:
  """EDM's second-order solver (arXiv:2206.00364, algorithm 1 without churn).

  Euler to the next noise level, then the mean of both noise predictions from the
  start; the last step, to noise 0, is Euler's alone: 2 N - 1 evaluations. Written
  for y = x / alpha at noise s = sigma / alpha, then scaled back by alpha.

  Raises:
    ValueError: the noise starts above HEUN_MAX, where steps in s are useless.
  """
  rows, noise = [], path.sigma / path.alpha
  noise_next = path.sigma_next / path.alpha_next
  if noise[0] > HEUN_MAX:
    raise ValueError(
      f"timesteps: heun cannot start at noise {noise[0]:.4g} (pi/2 is infinite); "
      f"start below {HEUN_MAX:g}, or take dpm2s or ddim"
    )
  for i, time in enumerate(path.time):
    s, s_next, alpha_1 = noise[i], noise_next[i], path.alpha_next[i]
    gain, h = alpha_1 / path.alpha[i], s_next - s
    euler = {"a": gain * (1 + h / s), "b": -alpha_1 * h / s}
    rows.append(euler | {"time": time, "step": i})
    if s_next == 0:
      continue
    correct = {"p": gain * (1 + h / (2 * s)), "c": -alpha_1 * h / (2 * s)}
    correct |= {"a": h / (2 * s_next), "b": -alpha_1 * h / (2 * s_next)}
    *point, time = path.point(-np.log(s_next))
    rows.append(correct | {"time": time, "point": point, "step": i})
  return _assemble(rows, path)


def dpm2s(path: NoiseSchedule) -> SolverTableau:
  """DPM-Solver++(2S) with r = 1/2 (arXiv:2211.01095, algorithm 1).

  DDIM to the midpoint in ln(alpha / sigma), then DDIM over the whole step with the
  midpoint's d; the last step, to noise 0, is DDIM's alone: 2 N - 1 evaluations.
  """
  rows = []
  for i, (alpha, sigma, time, alpha_1, sigma_1) in enumerate(
    zip(*path[:5], strict=True)
  ):
    whole = alpha_1 - alpha * sigma_1 / sigma
    if sigma_1 == 0:
      rows.append({"a": 0.0, "b": whole, "time": time, "step": i})
      continue
    middle = (np.log(alpha / sigma) + np.log(alpha_1 / sigma_1)) / 2
    alpha_m, sigma_m, time_m = path.point(middle)
    half = alpha_m - alpha * sigma_m / sigma
    rows.append({"a": sigma_m / sigma, "b": half, "time": time, "step": i})
    second = {"p": sigma_1 / sigma, "b": whole}
    second |= {"time": time_m, "point": (alpha_m, sigma_m)}
    rows.append(second | {"step": i})
  return _assemble(rows, path)


def consistency(path: NoiseSchedule) -> SolverTableau:
  """x' = alpha' d + sigma' z: jump to data, add fresh noise, again.

  The sampler of consistency models (arXiv:2303.01469, algorithm 1), with d = f.
  """
  columns = {"b": path.alpha_next, "s": path.sigma_next, "time": path.time}
  return _assemble(_rows(columns), path)


# name -> (solver, angles for a number of steps)
SOLVERS: dict[
  str, tuple[Callable[[NoiseSchedule], SolverTableau], Callable[..., np.ndarray]]
] = {
  "ddim": (ddim, time_grids.uniform_angles),
  "euler": (ddim, time_grids.karras_angles),  # Euler's method in noise is DDIM's step
  "ddpm": (ddpm, time_grids.uniform_angles),
  "ddpm_large": (functools.partial(ddpm, variance="large"), time_grids.uniform_angles),
  "dpmpp2m": (dpmpp, time_grids.karras_angles),
  "dpmpp3m": (functools.partial(dpmpp, order=3), time_grids.karras_angles),
  "dpmpp2m_sde": (functools.partial(dpmpp, sde=True), time_grids.uniform_angles),
  "heun": (heun, time_grids.karras_angles),
  "dpm2s": (dpm2s, time_grids.karras_angles),
  "consistency": (consistency, time_grids.consistency_angles),
}


def build(
  *,
  sigma_d: float,
  name: str,
  steps: int,
  timesteps: tuple[float, ...] = (),
  eta: float = 0.0,
  temperature: float = 1.0,
) -> SolverTableau:
  """Returns the table of a named solver on the TrigFlow path.

  Args:
    sigma_d: standard deviation of the data.
    name: a key of SOLVERS.
    steps: number of steps (heun and dpm2s evaluate 2 steps - 1 times).
    timesteps: the starting angle of every step, instead of the solver's own grid.
    eta: DDIM's share of noise.
    temperature: factor of the first state and of all noise; below 1 samples keep
      nearer to the modes (low-temperature sampling, arXiv:2211.15657).

  Raises:
    ValueError: an unknown name, steps below 1, angles that do not fall, or an eta or a
      temperature that does not fit.
  """
  if not 0 <= temperature < float("inf"):
    raise ValueError(f"temperature={temperature}: must be 0 or more")
  if name not in SOLVERS:
    raise ValueError(f"name={name!r}: take one of {[*SOLVERS]}")
  if steps < 1:
    raise ValueError(f"steps={steps}: take 1 or more")
  if not 0 <= eta <= 1:
    raise ValueError(f"eta={eta}: take 0 to 1")
  if eta and name != "ddim":
    raise ValueError(f"eta={eta}: ddim alone has an eta")
  solver, grid = SOLVERS[name]
  t = time_grids.given_timesteps(timesteps) if timesteps else grid(steps, sigma_d)
  path = noise_schedules.trigflow(t, sigma_d)
  table = ddim(path, eta) if eta else solver(path)
  return table._replace(s=temperature * table.s, init_std=temperature * table.init_std)
