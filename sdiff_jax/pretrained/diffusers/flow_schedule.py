"""The noise levels of a flow-matching model at the steps that diffusers takes.

The process is x = (1 - sigma) x0 + sigma eps; the network is given the timestep
T sigma and predicts eps - x0. Levels between 1 and 0 are shifted towards noise, by a
constant or by the number of tokens of the image (arXiv:2403.03206, section 5.3.2).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sdiff_jax.diffusion import noise_schedules, parameterizations, trigflow
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.pretrained.diffusers import sigma_grids
from sdiff_jax.pretrained.diffusers.dpm_solver import FinalOrders
from sdiff_jax.samplers.solvers import dpmpp
from sdiff_jax.samplers.tableau import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser

SPACINGS = ("linspace", "trailing")
ROUNDING = 1e-3  # a whole timestep may be less by an error of float32
# Number of tokens -> levels before the shift -> those after.
Shift = Callable[[int], Callable[[np.ndarray], np.ndarray]]


def shift_by(factor: float) -> Shift:
  """Returns the shift by a constant, factor sigma / (1 + (factor - 1) sigma).

  Args:
    factor: 1 is no shift, more is towards noise.

  Example:
    >>> shift_by(3.0)(4096)(np.array([1.0, 0.5]))
    array([1.  , 0.75])
  """
  return lambda tokens: lambda sigma: factor * sigma / (1 + (factor - 1) * sigma)


class FlowSchedule(NamedTuple):
  """The process of a flow-matching model, and how it is meant to be solved.

  Attributes:
    train_steps: T, the timestep of pure noise.
    smallest: the last training level.
    shift: number of tokens -> map of the levels before the shift to those after.
    terminal: the last level above 0, that the others are stretched to; 0 for none.
    grid: levels between the first and the last, a key of `sigma_grids.GRIDS`; "" as
      they are.
    tokens: number of tokens of an image, for a shift that depends on it.
    solver: a name of `solvers.names()`.
    spacing: of the levels before the shift: "linspace" from the first to the last
      training level, or "trailing" from 1 to 1 / N.
    first: level at which sampling begins, before the shift.
    whole: whether timesteps are rounded down to whole ones.
    levels: number of steps -> all levels, for a scheduler with a grid of its own.
    final_orders: see `dpm_solver.final_orders`.
  """

  train_steps: int
  smallest: float
  shift: Shift = shift_by(1.0)
  terminal: float = 0.0
  grid: str = ""
  tokens: int = 4096
  solver: str = "ddim"
  spacing: str = "linspace"
  first: float = 1.0
  whole: bool = False
  levels: Callable[[int], np.ndarray] | None = None
  final_orders: FinalOrders = dpmpp.short_orders


def sigmas(schedule: FlowSchedule, steps: int) -> np.ndarray:
  """Returns the noise level at the start of each step, decreasing, float64 [N].

  Args:
    schedule: the process.
    steps: number of steps N.

  Raises:
    ValueError: a number of steps or a spacing that does not fit.

  Example:
    >>> sigmas(FlowSchedule(train_steps=4, smallest=0.25), 4)
    array([1.  , 0.75, 0.5 , 0.25])
  """
  if steps < 1:
    raise ValueError(f"steps={steps}: must be at least 1")
  if schedule.spacing not in SPACINGS:
    raise ValueError(
      f"timestep_spacing={schedule.spacing!r}: must be one of {', '.join(SPACINGS)} for "
      "a flow-matching model"
    )
  if schedule.levels is not None:
    if schedule.spacing != FlowSchedule._field_defaults["spacing"]:
      raise ValueError(
        f"timestep_spacing={schedule.spacing!r}: the model's scheduler has a grid of its "
        "own"
      )
    return schedule.levels(steps)
  first = schedule.first
  last = schedule.smallest if schedule.spacing == "linspace" else first / steps
  levels = schedule.shift(schedule.tokens)(np.linspace(first, last, steps))
  if schedule.terminal:
    if steps == 1:
      raise ValueError("steps=1: must be at least 2 for shift_terminal")
    levels = 1 - (1 - levels) * ((1 - schedule.terminal) / (1 - levels[-1]))
  if schedule.grid:
    levels = sigma_grids.levels(schedule.grid, levels[0], levels[-1], steps)
  return levels


def noise_schedule(schedule: FlowSchedule, steps: int) -> NoiseSchedule:
  """Returns the noise levels of the steps that diffusers takes.

  Args:
    schedule: the process.
    steps: number of steps.

  Raises:
    ValueError: a number of steps that does not fit.

  Example:
    >>> noise_schedule(FlowSchedule(train_steps=1000, smallest=1e-3), 2).time
    array([1.   , 0.001])
  """
  return noise_schedules.flow(np.append(sigmas(schedule, steps), 0.0))


def check(table: SolverTableau, solver: str) -> None:
  """Checks that a solver can start where a flow-matching model begins.

  Args:
    table: of the solver.
    solver: its name.

  Raises:
    ValueError: a coefficient is not finite.
  """
  parts = table.x_coef, table.denoised_coef, table.noise_coef, table.time
  if not all(np.isfinite(part).all() for part in parts):
    raise ValueError(
      f"name={solver!r}: has no finite step from pure noise, where a flow-matching model "
      "begins; use 'ddim', which is its Euler's method"
    )


def denoiser(
  predict: Callable[[Array, Array, Cond], Array], schedule: FlowSchedule
) -> Denoiser:
  """Returns the denoiser x - sigma F(x, T sigma) of a network.

  A flow map is given the end time of a step, too, as the timestep T sigma'; it predicts
  the average velocity (x - x') / (sigma - sigma').

  Args:
    predict: (x [N, ...], timestep [N], cond) -> prediction of eps - x0, [N, ...].
    schedule: the process.

  Example:
    >>> schedule = FlowSchedule(train_steps=1000, smallest=1e-3)
    >>> denoise = denoiser(lambda x, timestep, cond: x, schedule)
    >>> denoise(jnp.ones((1, 2)), jnp.array([0.25]), None)
    Array([[0.75, 0.75]], dtype=float32)
  """

  def timestep(time: Array) -> Array:
    found = schedule.train_steps * time
    return jnp.floor(found + ROUNDING) if schedule.whole else found

  def call(x: Array, time: Array, cond: Cond) -> Array:
    if cond is not None and trigflow.END_TIME in cond:
      cond = trigflow.with_end_time(cond, timestep(cond[trigflow.END_TIME]))
    return predict(x, timestep(time), cond)

  return parameterizations.denoiser(call, "flow", parameterizations.flow)
