"""Noise schedules and solvers of published models, from their scheduler_config.json."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sdiff_jax.diffusion import noise_schedules, parameterizations
from sdiff_jax.pretrained.diffusers import (
  betas,
  flow_scheduler,
  lcm_scheduler,
  sigma_grids,
)
from sdiff_jax.pretrained.diffusers.flow_scheduler import FlowSchedule
from sdiff_jax.pretrained.diffusers.lcm_scheduler import Boundary
from sdiff_jax.pretrained.diffusers.scheduler_fields import (
  CLASSES,
  FIELDS,
  IGNORED_FIELDS,
  PREDICTION_TYPES,
  VARIANCES,
)
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.samplers import solvers
from sdiff_jax.samplers.tableau import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, Json

CLASS_NAMES = {f"{name}Scheduler": name for name in CLASSES}
CLASS_NAMES |= {f"{name}ParallelScheduler": name for name in ("DDIM", "DDPM")}
NAMES = (*CLASS_NAMES, flow_scheduler.CLASS_NAME, flow_scheduler.SCM_NAME)
OF_TWO_TIMES = "FlowMapEulerDiscreteScheduler"
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


def from_config(config: dict[str, Json]) -> Schedule | FlowSchedule:
  """Returns the schedule of a scheduler_config.json.

  PNDM is solved by DDIM, since it is not implemented.

  Args:
    config: the file's content.

  Raises:
    ValueError: an unknown class, or fields or values that are not supported; all of them
      are listed.

  Example:
    >>> from_config({"_class_name": "DDIMScheduler"}).solver
    'ddim'
  """
  name = config.get("_class_name", "")
  if name == flow_scheduler.CLASS_NAME:
    return flow_scheduler.from_config(config)
  if name == "DPMSolverMultistepScheduler" and config.get("use_flow_sigmas") is True:
    return flow_scheduler.from_dpm_config(config)
  if name == flow_scheduler.SCM_NAME:
    return flow_scheduler.from_scm_config(config)
  if name == OF_TWO_TIMES:
    raise ValueError(
      f"_class_name={name!r}: is for networks of two times, and no such network of the "
      "diffusers format can be read; those trained here have the sampler flow_map"
    )
  if not isinstance(name, str) or name not in CLASS_NAMES:
    raise ValueError(
      f"_class_name={config_fields.quoted(name)}: must be one of {', '.join(NAMES)}"
    )
  own, supported = CLASSES[CLASS_NAMES[name]]
  # A file that was written for one class may be used by another; its fields stay there.
  others = {k for pair in CLASSES.values() for part in pair for k in part}
  unused = IGNORED_FIELDS | others - own.keys() - supported.keys() - FIELDS.keys()
  c = config_fields.validated_config(config, FIELDS | own, supported, unused)
  betas.check(c, config)
  abar = betas.abar(c)
  if abar[-1] == 0 and c["prediction_type"] == "epsilon":
    raise ValueError(
      "prediction_type='epsilon': the last timestep of these betas is pure noise (zero "
      "terminal SNR), of which the noise tells nothing about the data; must be "
      "'v_prediction' or 'sample'"
    )
  to_clean = c.get("set_alpha_to_one", c.get("final_sigmas_type", "zero") == "zero")
  dynamic, grid = bool(c.get("thresholding")), sigma_grids.chosen(c)
  clip = c.get("clip_sample", False) * c.get("clip_sample_range", 1.0)
  return Schedule(
    abar,
    PREDICTION_TYPES[c["prediction_type"]],
    _solver(CLASS_NAMES[name], c),
    c["timestep_spacing"],
    c["steps_offset"],
    1.0 if to_clean else float(abar[0]),
    1.0 if dynamic else clip,
    dynamic * c.get("dynamic_thresholding_ratio", 0.0),
    c["sample_max_value"] if dynamic else np.inf,
    grid,
    sigma_grids.whole(CLASS_NAMES[name], grid, c["beta_schedule"]),
    Boundary(c["original_inference_steps"], c["timestep_scaling"])
    if name == "LCMScheduler"
    else None,
  )


def _abar_for(schedule: Schedule, solver: str) -> np.ndarray:
  """Returns alpha^2 at each timestep, above 0 for a solver that cannot start at 0."""
  if solver in FROM_PURE_NOISE:
    return schedule.abar
  return np.maximum(schedule.abar, SMALLEST_ABAR * (schedule.abar == 0))


def _solver(class_name: str, c: dict[str, Json]) -> str:
  """Returns the name of the solver that a config asks for."""
  if class_name in BY_SIGMA:
    return BY_SIGMA[class_name]
  if class_name == "LCM":
    return lcm_scheduler.SOLVER
  if class_name == "DDPM":
    return VARIANCES[c["variance_type"]]
  if "solver_order" not in c:
    return "ddim"
  algorithm, order = c.get("algorithm_type", "unipc"), c["solver_order"]
  if (algorithm, order) not in MULTISTEP:
    raise ValueError(
      f"algorithm_type={config_fields.quoted(algorithm)}, solver_order={order}: must be "
      "'dpmsolver++' or UniPC with order 2 or 3, or 'sde-dpmsolver++' with order 2"
    )
  return MULTISTEP[algorithm, order]


def tableau(
  schedule: Schedule | FlowSchedule, steps: int, solver: str = ""
) -> SolverTableau:
  """Returns the tableau of a solver at the timesteps that diffusers uses for it.

  Args:
    schedule: the process.
    steps: number of steps.
    solver: a name of `solvers.names()`; "" for the schedule's own.

  Raises:
    ValueError: an unknown solver, or a number of steps that does not fit.

  Example:
    >>> schedule = from_config({"_class_name": "DDIMScheduler"})
    >>> tableau(schedule, 4).time
    array([750., 500., 250.,   0.])
  """
  if isinstance(schedule, FlowSchedule):
    return flow_scheduler.tableau(schedule, steps, solver)
  solver = solver or schedule.solver
  abar, spacing, last = _abar_for(schedule, solver), schedule.spacing, schedule.last
  if solver == lcm_scheduler.SOLVER and schedule.boundary:
    return lcm_scheduler.tableau(schedule.boundary, abar, steps)
  if schedule.grid:
    return _grid_tableau(schedule, abar, steps, solver)
  if solver in BY_SIGMA.values():
    return _euler_tableau(schedule, abar, steps, solver)
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
  if starts[0] >= num_train:
    raise ValueError(
      f"steps={steps}: begins at timestep {starts[0]} by timestep_spacing={spacing!r} "
      f"with steps_offset={schedule.offset}, but the model's last timestep is "
      f"{num_train - 1}; use fewer steps, or another spacing"
    )
  if solver == "ddim":
    ends = starts - num_train // steps
  if solver in TO_CLEAN_DATA:
    last = 1.0
  return solvers.from_schedule(
    solver, noise_schedules.vp(abar, starts, ends=ends, final_abar=last)
  )


def _euler_tableau(
  schedule: Schedule, abar: np.ndarray, steps: int, solver: str
) -> SolverTableau:
  """Returns the tableau of Euler's method in sigma / alpha, as diffusers has it.

  The last step ends at clean data, and a timestep beyond the last one has the noise
  level of the last one. With "leading" spacing the first state has variance 1, otherwise
  sigma^2.
  """
  path = noise_schedules.vp_by_sigma(abar, _euler_starts(schedule, steps))
  tableau = solvers.from_schedule(solver, path)
  return tableau._replace(init_std=1.0) if schedule.spacing == "leading" else tableau


def _euler_starts(schedule: Schedule, steps: int) -> np.ndarray:
  """Returns timesteps, of which those of "linspace" are not rounded, float64 [N]."""
  spacing, num_train = schedule.spacing, len(schedule.abar)
  starts = noise_schedules.timesteps(num_train, steps, spacing, schedule.offset)
  if spacing == "linspace":
    starts = np.linspace(0, num_train - 1, steps)[::-1]
  if starts[0] > num_train:
    raise ValueError(
      f"steps={steps}: begins at timestep {starts[0]} by timestep_spacing={spacing!r} "
      f"with steps_offset={schedule.offset}, but the model's last timestep is "
      f"{num_train - 1}; use fewer steps, or another spacing"
    )
  return starts.astype(np.float64)


def _grid_tableau(
  schedule: Schedule, abar: np.ndarray, steps: int, solver: str
) -> SolverTableau:
  """Returns the tableau of a solver at noise levels that are no timesteps'.

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
  path = noise_schedules.vp_of_ratios(np.maximum(abar, SMALLEST_ABAR), levels)
  with np.errstate(all="ignore"):  # a step of length 0, whose corrector is not used
    table = solvers.from_schedule(solver, path)
  leading = by_sigma and schedule.spacing == "leading"
  return table._replace(init_std=1.0) if leading else table


def denoiser(
  predict: Callable[[Array, Array, Cond], Array],
  schedule: Schedule | FlowSchedule,
  tableau: SolverTableau,
  solver: str = "",
) -> Denoiser:
  """Returns the denoiser of a network for a solver of its schedule.

  Where DDIM clips the estimate d of x0, diffusers keeps the noise from before the clip:

      x' = alpha' clip(d) + sigma' (x - alpha d) / sigma,

  which is a step a x + b D with D = clip(d) + (alpha a / b) (clip(d) - d).

  Args:
    predict: (x [N, ...], time [N], cond) -> prediction [N, ...].
    schedule: the process.
    tableau: what `tableau` returned.
    solver: see `tableau`.
  """
  if isinstance(schedule, FlowSchedule):
    return flow_scheduler.denoiser(predict, schedule)
  solver, excess = solver or schedule.solver, None
  if schedule.clip and solver == "ddim":
    weight = tableau.alpha * tableau.x_coef[:, 0] / tableau.denoised_coef[:, 0]

    def excess(time: Array) -> Array:
      at, values = (jnp.asarray(v[::-1], time.dtype) for v in (tableau.time, weight))
      return jnp.interp(time, at, values)

  abar = _abar_for(schedule, solver)
  level = parameterizations.vp(abar)
  if schedule.grid:
    level = parameterizations.vp(np.maximum(abar, SMALLEST_ABAR))
    predict = sigma_grids.at_whole_timesteps(predict, schedule.whole)
  elif solver in BY_SIGMA.values():
    level = parameterizations.vp_by_sigma(abar)
  return parameterizations.denoiser(
    predict,
    schedule.kind,
    level,
    clip=schedule.clip,
    quantile=schedule.quantile,
    largest=schedule.largest,
    excess=excess,
  )
