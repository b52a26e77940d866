"""Noise schedules and solvers of published models, from their scheduler_config.json.

Each class of diffusers has a reader, (content of the file) -> schedule. It raises a
ValueError that lists all fields and values that are not supported.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from sdiff_jax.diffusion import parameterizations
from sdiff_jax.pretrained.diffusers import (
  betas,
  dpm_solver,
  flow_schedule,
  flow_scheduler,
  lcm_scheduler,
  sigma_grids,
  vp_schedule,
)
from sdiff_jax.pretrained.diffusers.flow_schedule import FlowSchedule
from sdiff_jax.pretrained.diffusers.lcm_scheduler import Boundary
from sdiff_jax.pretrained.diffusers.scheduler_fields import (
  CLASSES,
  FIELDS,
  IGNORED_FIELDS,
  PREDICTION_TYPES,
  VARIANCES,
)
from sdiff_jax.pretrained.diffusers.vp_schedule import Schedule
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.samplers import solvers
from sdiff_jax.samplers.tableau import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, Json

CLASS_NAMES = {f"{name}Scheduler": name for name in CLASSES}
CLASS_NAMES |= {f"{name}ParallelScheduler": name for name in ("DDIM", "DDPM")}
NAMES = (*CLASS_NAMES, *flow_scheduler.READERS)


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
  if not isinstance(name, str) or name not in NAMES:
    raise ValueError(
      f"_class_name={config_fields.quoted(name)}: must be one of {', '.join(NAMES)}"
    )
  if name in flow_scheduler.READERS:
    return flow_scheduler.READERS[name](config)
  if name == "DPMSolverMultistepScheduler" and config.get("use_flow_sigmas") is True:
    return flow_scheduler.from_dpm_config(config)
  return _from_betas(config, name)


def _from_betas(config: dict[str, Json], name: str) -> Schedule:
  """Returns the schedule of a class whose process has betas."""
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
    dpm_solver.final_orders(c),
  )


def _solver(class_name: str, c: dict[str, Json]) -> str:
  """Returns the name of the solver that a config asks for."""
  if class_name in vp_schedule.BY_SIGMA:
    return vp_schedule.BY_SIGMA[class_name]
  if class_name == "LCM":
    return lcm_scheduler.SOLVER
  if class_name == "DDPM":
    return VARIANCES[c["variance_type"]]
  if "solver_order" not in c:
    return "ddim"
  algorithm, order = c.get("algorithm_type", "unipc"), c["solver_order"]
  if (algorithm, order) not in vp_schedule.MULTISTEP:
    raise ValueError(
      f"algorithm_type={config_fields.quoted(algorithm)}, solver_order={order}: must be "
      "'dpmsolver++' or UniPC with order 2 or 3, or 'sde-dpmsolver++' with order 2"
    )
  return vp_schedule.MULTISTEP[algorithm, order]


def tableau(
  schedule: Schedule | FlowSchedule,
  steps: int,
  solver: str = "",
  *,
  strength: float | None = None,
) -> SolverTableau:
  """Returns the tableau of a solver at the timesteps that diffusers uses for it.

  Args:
    schedule: the process.
    steps: number of steps.
    solver: a name of `solvers.names()`; "" for the schedule's own.
    strength: the part of the steps that are taken, the last ones, from a noised image;
      None to start from noise alone.

  Raises:
    ValueError: an unknown solver, a number of steps that does not fit, or a strength that
      leaves no step.

  Example:
    >>> schedule = from_config({"_class_name": "DDIMScheduler"})
    >>> tableau(schedule, 4).time
    array([750., 500., 250.,   0.])
    >>> tableau(schedule, 4, strength=0.6).time
    array([250.,   0.])
  """
  solver = solver or schedule.solver
  if isinstance(schedule, FlowSchedule):
    path = flow_schedule.noise_schedule(schedule, steps)
  else:
    path = vp_schedule.noise_schedule(schedule, steps, solver)
  if strength is not None:
    path = path.last(steps_taken(schedule, steps, strength))
  given = {}
  if solver in vp_schedule.DPM_SOLVERS:
    given["final_orders"] = schedule.final_orders(steps)
  with np.errstate(all="ignore"):  # steps of length 0, or from pure noise
    table = solvers.from_schedule(solver, path, **given)
  if isinstance(schedule, FlowSchedule):
    flow_schedule.check(table, solver)
  elif solver == lcm_scheduler.SOLVER and schedule.boundary:
    table = lcm_scheduler.with_boundary(schedule.boundary, table)
  by_sigma = solver in vp_schedule.BY_SIGMA.values() and schedule.spacing != "leading"
  if strength is None and not by_sigma:
    # As in diffusers, pure noise has variance 1, that of data of variance 1 at any level.
    table = table._replace(init_std=table.init_std / path.sigma[0])
  return table


def steps_taken(schedule: Schedule | FlowSchedule, steps: int, strength: float) -> int:
  """Returns how many of the steps diffusers takes from a noised image.

  Its pipelines of flow models round up, the others down.

  Args:
    schedule: the process.
    steps: number of all steps.
    strength: the part of them that is taken.

  Raises:
    ValueError: none is taken, or more than all.

  Example:
    >>> steps_taken(from_config({"_class_name": "DDIMScheduler"}), 10, 0.75)
    7
  """
  taken = int(steps * strength)
  if isinstance(schedule, FlowSchedule):
    taken = steps - int(steps - steps * strength)
  if not 1 <= taken <= steps:
    raise ValueError(
      f"strength={strength}: takes {taken} of steps={steps}; must take 1 to {steps}"
    )
  return taken


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
    return flow_schedule.denoiser(predict, schedule)
  solver, excess = solver or schedule.solver, None
  if schedule.clip and solver == "ddim":
    weight = tableau.alpha * tableau.x_coef[:, 0] / tableau.denoised_coef[:, 0]

    def excess(time: Array) -> Array:
      at, values = (jnp.asarray(v[::-1], time.dtype) for v in (tableau.time, weight))
      return jnp.interp(time, at, values)

  abar = vp_schedule.abar_for(schedule, solver)
  level = parameterizations.vp(abar)
  if schedule.grid:
    level = parameterizations.vp(np.maximum(abar, vp_schedule.SMALLEST_ABAR))
    predict = sigma_grids.at_whole_timesteps(predict, schedule.whole)
  elif solver in vp_schedule.BY_SIGMA.values():
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
