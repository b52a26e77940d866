"""The noise levels of a process with betas at the steps that diffusers takes."""

from typing import NamedTuple

import numpy as np

from sdiff_jax.diffusion import noise_schedules
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.pretrained.diffusers import lcm_scheduler, sigma_grids
from sdiff_jax.pretrained.diffusers.dpm_solver import FinalOrders
from sdiff_jax.pretrained.diffusers.lcm_scheduler import Boundary
from sdiff_jax.pretrained.diffusers.scheduler_fields import VARIANCES
from sdiff_jax.samplers.solvers import dpmpp

# Class -> solver of the classes whose timesteps need not be whole.
BY_SIGMA = {"EulerDiscrete": "euler", "EulerAncestralDiscrete": "euler_ancestral"}
# (algorithm, order) -> solver
MULTISTEP = {
  ("dpmsolver++", 2): "dpmpp2m",
  ("dpmsolver++", 3): "dpmpp3m",
  ("sde-dpmsolver++", 2): "dpmpp2m_sde",
  ("unipc", 2): "unipc2",
  ("unipc", 3): "unipc3",
}
DPM_SOLVERS = frozenset(v for (name, _), v in MULTISTEP.items() if "dpm" in name)
# Solvers whose last step ends at a timestep of the grid, except with "trailing" spacing.
WITH_END_TIMESTEP = frozenset(MULTISTEP.values())
# Solvers that always end at clean data.
TO_CLEAN_DATA = frozenset(VARIANCES.values())
# Solvers whose steps are finite where the process begins at pure noise, alpha = 0.
FROM_PURE_NOISE = frozenset({"ddim", *VARIANCES.values()})
# alpha^2 of pure noise for the other solvers, the value of diffusers.
SMALLEST_ABAR = 2.0**-24


class Schedule(NamedTuple):
  """The diffusion process of a published model, and how it is meant to be solved.

  Attributes:
    abar: alpha^2 at each training timestep, float64 [T].
    kind: what the network predicts, a key of `parameterizations.PARAMETERIZATIONS`.
    solver: a name of `solvers.names()`.
    spacing: of the timesteps (see `noise_schedules.timesteps`).
    offset: added to "leading" timesteps.
    last: alpha^2 at the end of the process.
    clip: range that the denoiser clips its estimate of x0 to; 0 for no clipping.
    quantile: of dynamic thresholding, 0 for none; `clip` is 1.
    largest: the largest range of dynamic thresholding.
    grid: noise levels in place of those of timesteps, a key of `sigma_grids.GRIDS`.
    whole: how the network's timesteps on a grid become whole ones, a key of
      `sigma_grids.WHOLE`.
    boundary: of LCM; None for other models.
    final_orders: see `dpm_solver.final_orders`.
  """

  abar: np.ndarray
  kind: str
  solver: str
  spacing: str
  offset: int
  last: float
  clip: float
  quantile: float = 0.0
  largest: float = np.inf
  grid: str = ""
  whole: str = ""
  boundary: Boundary | None = None
  final_orders: FinalOrders = dpmpp.short_orders


def abar_for(schedule: Schedule, solver: str) -> np.ndarray:
  """Returns alpha^2 at each timestep, above 0 for a solver that cannot start at 0.

  Args:
    schedule: the process.
    solver: a name of `solvers.names()`.
  """
  if solver in FROM_PURE_NOISE:
    return schedule.abar
  return np.maximum(schedule.abar, SMALLEST_ABAR * (schedule.abar == 0))


def noise_schedule(schedule: Schedule, steps: int, solver: str) -> NoiseSchedule:
  """Returns the noise levels of the steps that diffusers takes with a solver.

  Args:
    schedule: the process.
    steps: number of steps.
    solver: a name of `solvers.names()`.

  Raises:
    ValueError: a number of steps that does not fit.
  """
  abar, spacing, last = abar_for(schedule, solver), schedule.spacing, schedule.last
  if solver == lcm_scheduler.SOLVER and schedule.boundary:
    starts = lcm_scheduler.timesteps(schedule.boundary, len(abar), steps)
    return noise_schedules.vp(abar, starts)
  if schedule.grid:
    return _of_grid(schedule, abar, steps, solver)
  if solver in BY_SIGMA.values():
    return noise_schedules.vp_by_sigma(abar, _euler_starts(schedule, steps))
  num_train, ends = len(abar), None
  if solver in WITH_END_TIMESTEP and spacing != "trailing":
    if not 1 <= steps < num_train:
      raise ValueError(
        f"steps={steps}: must be in 1 to {num_train - 1} for {solver!r} at "
        f"timestep_spacing={spacing!r}"
      )
    grid = noise_schedules.timesteps(num_train, steps + 1, spacing, schedule.offset)
    starts = grid[:-1]
  else:
    starts = noise_schedules.timesteps(num_train, steps, spacing, schedule.offset)
  _check_first(schedule, steps, starts[0], num_train - 1)
  if solver == "ddim":
    ends = starts - num_train // steps
  if solver in TO_CLEAN_DATA:
    last = 1.0
  return noise_schedules.vp(abar, starts, ends=ends, final_abar=last)


def _euler_starts(schedule: Schedule, steps: int) -> np.ndarray:
  """Returns timesteps, of which those of "linspace" are not rounded, float64 [N]."""
  spacing, num_train = schedule.spacing, len(schedule.abar)
  starts = noise_schedules.timesteps(num_train, steps, spacing, schedule.offset)
  if spacing == "linspace":
    starts = np.linspace(0, num_train - 1, steps)[::-1]
  _check_first(schedule, steps, starts[0], num_train)
  return starts.astype(np.float64)


def _check_first(schedule: Schedule, steps: int, first: float, largest: int) -> None:
  """Raises a ValueError if the first of the timesteps is above the largest one."""
  if first > largest:
    raise ValueError(
      f"steps={steps}: begins at timestep {first} by timestep_spacing="
      f"{schedule.spacing!r} with steps_offset={schedule.offset}, but the model's last "
      f"timestep is {len(schedule.abar) - 1}; use fewer steps, or another spacing"
    )


def _of_grid(
  schedule: Schedule, abar: np.ndarray, steps: int, solver: str
) -> NoiseSchedule:
  """Returns noise levels that are no timesteps'.

  They lie between the first and the last training level; for Euler's method, between
  those of its timesteps.
  """
  ratios = (1 / np.maximum(abar, SMALLEST_ABAR) - 1) ** 0.5
  ends, by_sigma = ratios[[-1, 0]], solver in BY_SIGMA.values()
  if by_sigma:
    starts = _euler_starts(schedule, steps)
    ends = np.interp(starts[[0, -1]], np.arange(len(ratios)), ratios)
  last = 0.0 if by_sigma else (1 / schedule.last - 1) ** 0.5
  levels = np.append(sigma_grids.levels(schedule.grid, *ends, steps), last)
  if np.isclose(levels[-2], last, rtol=1e-9):  # the same, but for rounding
    levels[-2] = last
  return noise_schedules.vp_of_ratios(np.maximum(abar, SMALLEST_ABAR), levels)
