"""Noise schedules and solvers of published models, from their scheduler_config.json."""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from sdiff_jax.diffusion import noise_schedules, parameterizations
from sdiff_jax.pretrained.diffusers import flow_scheduler
from sdiff_jax.pretrained.diffusers.flow_scheduler import FlowSchedule
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Field, Fields, Fraction, Positive
from sdiff_jax.samplers import solvers
from sdiff_jax.samplers.tableau import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, Json, NetFn

PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETA_SCHEDULES = {
  "linear": "linear",
  "scaled_linear": "scaled_linear",
  "squaredcos_cap_v2": "cosine",
}
UNSUPPORTED_FIELDS = (None, False)
MAX_TIMESTEPS = 100_000
Timesteps = Annotated[int, Meta(ge=1, le=MAX_TIMESTEPS)]
Betas = Annotated[
  list[Annotated[float, Meta(gt=0, le=1)]], Meta(min_length=1, max_length=MAX_TIMESTEPS)
]
Spacing = Literal["leading", "linspace", "trailing"]
FinalSigmas = Literal["zero", "sigma_min"]
FIELDS = {
  "num_train_timesteps": Field(1000, Timesteps),
  "beta_start": Field(0.0001, Fraction),
  "beta_end": Field(0.02, Fraction),
  "beta_schedule": Field("linear", Literal[tuple(BETA_SCHEDULES)]),
  "trained_betas": Field(None, Betas | None),
  "prediction_type": Field("epsilon", Literal[tuple(PREDICTION_TYPES)]),
  "timestep_spacing": Field("leading", Spacing),
  "steps_offset": Field(0, Annotated[int, Meta(ge=0, lt=MAX_TIMESTEPS)]),
}
SUPPORTED_VALUES = {"thresholding": UNSUPPORTED_FIELDS}
ZERO_SNR = {"rescale_betas_zero_snr": Field(False, bool)}
LINSPACE = {"timestep_spacing": Field("linspace", Spacing)}
CLIP = {
  "clip_sample": Field(True, bool),
  "clip_sample_range": Field(1.0, Positive),
}
OTHER_GRIDS = {
  f"use_{name}": UNSUPPORTED_FIELDS
  for name in (
    *("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas"),
    *("flow_sigmas", "dynamic_shifting"),
  )
}
MULTISTEP_FIELDS = LINSPACE | {
  "solver_order": Field(2, Annotated[int, Meta(ge=1, le=16)]),
  "final_sigmas_type": Field("zero", FinalSigmas),
}
DPM_FIELDS = MULTISTEP_FIELDS | {"algorithm_type": Field("dpmsolver++", str)}
DPM_SUPPORTED_VALUES = {
  "solver_type": ("midpoint",),
  "lower_order_final": (True,),
  "lambda_min_clipped": (-np.inf,),
  "variance_type": UNSUPPORTED_FIELDS,
  "flow_shift": (1.0,),
  "euler_at_final": UNSUPPORTED_FIELDS,
} | OTHER_GRIDS
EULER_SUPPORTED_VALUES = {
  "interpolation_type": ("linear",),
  "timestep_type": ("discrete",),
  "final_sigmas_type": ("zero",),
  "sigma_min": UNSUPPORTED_FIELDS,
  "sigma_max": UNSUPPORTED_FIELDS,
  **{f"use_{n}_sigmas": UNSUPPORTED_FIELDS for n in ("karras", "exponential", "beta")},
}
UNIPC_SUPPORTED_VALUES = {
  "predict_x0": (True,),
  "solver_type": ("bh2",),
  "lower_order_final": (True,),
  "disable_corrector": ([],),
  "solver_p": UNSUPPORTED_FIELDS,
  "flow_shift": (1.0,),
  "sigma_min": UNSUPPORTED_FIELDS,
  "sigma_max": UNSUPPORTED_FIELDS,
  "shift_terminal": UNSUPPORTED_FIELDS,
} | OTHER_GRIDS
VARIANCES = {
  **{"fixed_small": "ddpm", "fixed_small_log": "ddpm"},
  **{"fixed_large": "ddpm_large", "fixed_large_log": "ddpm_large"},
}
VARIANCE = Field("fixed_small", Literal[tuple(VARIANCES)])
# Class -> its own fields, and those with only some supported values.
CLASSES: dict[str, tuple[Fields, Mapping[str, tuple]]] = {
  "DDIM": (CLIP | ZERO_SNR | {"set_alpha_to_one": Field(True, bool)}, {}),
  "DDPM": (CLIP | ZERO_SNR | {"variance_type": VARIANCE}, {}),
  "PNDM": (
    {"set_alpha_to_one": Field(False, bool)},
    {"rescale_betas_zero_snr": UNSUPPORTED_FIELDS},
  ),
  "DPMSolverMultistep": (ZERO_SNR | DPM_FIELDS, DPM_SUPPORTED_VALUES),
  "EulerDiscrete": (ZERO_SNR | LINSPACE, EULER_SUPPORTED_VALUES),
  "UniPCMultistep": (ZERO_SNR | MULTISTEP_FIELDS, UNIPC_SUPPORTED_VALUES),
}
CLASS_NAMES = {f"{name}Scheduler": name for name in CLASSES}
CLASS_NAMES |= {f"{name}ParallelScheduler": name for name in ("DDIM", "DDPM")}
NAMES = (*CLASS_NAMES, flow_scheduler.CLASS_NAME, flow_scheduler.SCM_NAME)
IGNORED_FIELDS = {"dynamic_thresholding_ratio", "sample_max_value", "skip_prk_steps"}
IGNORED_FIELDS |= {"time_shift_type"}
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
  """

  abar: np.ndarray
  kind: str
  solver: str
  spacing: str
  offset: int
  last: float
  clip: float


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
  if not isinstance(name, str) or name not in CLASS_NAMES:
    raise ValueError(
      f"_class_name={config_fields.quoted(name)}: must be one of {', '.join(NAMES)}"
    )
  own, supported = CLASSES[CLASS_NAMES[name]]
  # A file that was written for one class may be used by another; its fields stay there.
  others = {k for pair in CLASSES.values() for part in pair for k in part}
  unused = IGNORED_FIELDS | others - own.keys() - supported.keys() - FIELDS.keys()
  c = config_fields.validated_config(
    config, FIELDS | own, SUPPORTED_VALUES | supported, unused
  )
  _check_betas(c, config)
  abar = _abar(c)
  if abar[-1] == 0 and c["prediction_type"] == "epsilon":
    raise ValueError(
      "prediction_type='epsilon': the last timestep of these betas is pure noise (zero "
      "terminal SNR), of which the noise tells nothing about the data; must be "
      "'v_prediction' or 'sample'"
    )
  to_clean = c.get("set_alpha_to_one", c.get("final_sigmas_type", "zero") == "zero")
  return Schedule(
    abar,
    PREDICTION_TYPES[c["prediction_type"]],
    _solver(CLASS_NAMES[name], c),
    c["timestep_spacing"],
    c["steps_offset"],
    1.0 if to_clean else float(abar[0]),
    c.get("clip_sample", False) * c.get("clip_sample_range", 1.0),
  )


def _check_betas(c: dict[str, Json], config: dict[str, Json]) -> None:
  """Raises a ValueError if fields of a config contradict each other."""
  betas, steps = c["trained_betas"], c["num_train_timesteps"]
  if betas is None and c["beta_start"] > c["beta_end"]:
    raise ValueError(
      f"beta_start={c['beta_start']}: must be at most beta_end={c['beta_end']}"
    )
  if betas is None and c["steps_offset"] >= steps:
    raise ValueError(
      f"steps_offset={c['steps_offset']}: must be below num_train_timesteps={steps}"
    )
  if betas is not None and "num_train_timesteps" in config and len(betas) != steps:
    raise ValueError(
      f"trained_betas: must be as many as num_train_timesteps={steps}, not {len(betas)}"
    )
  if betas is not None and 1 in betas[:-1]:
    raise ValueError("trained_betas: only the last one may be 1")


def _abar(c: dict[str, Json]) -> np.ndarray:
  """Returns alpha^2 at each training timestep; the last one may be 0."""
  if c["trained_betas"] is not None:
    abar = np.cumprod(1 - np.asarray(c["trained_betas"], np.float64))
  else:
    abar = noise_schedules.alphas_cumprod(
      BETA_SCHEDULES[c["beta_schedule"]],
      c["num_train_timesteps"],
      start=c["beta_start"],
      end=c["beta_end"],
    )
  if c.get("rescale_betas_zero_snr", False):
    abar = noise_schedules.rescale_zero_terminal_snr(abar)
  return abar


def _abar_for(schedule: Schedule, solver: str) -> np.ndarray:
  """Returns alpha^2 at each timestep, above 0 for a solver that cannot start at 0."""
  if solver in FROM_PURE_NOISE:
    return schedule.abar
  return np.maximum(schedule.abar, SMALLEST_ABAR * (schedule.abar == 0))


def _solver(class_name: str, c: dict[str, Json]) -> str:
  """Returns the name of the solver that a config asks for."""
  if class_name == "EulerDiscrete":
    return "euler"
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
  if solver == "euler":
    return _euler_tableau(schedule, abar, steps)
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


def _euler_tableau(schedule: Schedule, abar: np.ndarray, steps: int) -> SolverTableau:
  """Returns the tableau of Euler's method in sigma / alpha, as diffusers has it.

  Timesteps of "linspace" are not rounded, the last step ends at clean data, and a
  timestep beyond the last one has the noise level of the last one. With "leading" spacing
  the first state has variance 1, otherwise sigma^2.
  """
  spacing, num_train = schedule.spacing, len(abar)
  starts = noise_schedules.timesteps(num_train, steps, spacing, schedule.offset)
  if spacing == "linspace":
    starts = np.linspace(0, num_train - 1, steps)[::-1]
  if starts[0] > num_train:
    raise ValueError(
      f"steps={steps}: begins at timestep {starts[0]} by timestep_spacing={spacing!r} "
      f"with steps_offset={schedule.offset}, but the model's last timestep is "
      f"{num_train - 1}; use fewer steps, or another spacing"
    )
  tableau = solvers.from_schedule(
    "euler", noise_schedules.vp_by_sigma(abar, starts.astype(np.float64))
  )
  return tableau._replace(init_std=1.0) if spacing == "leading" else tableau


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
  by_sigma = solver == "euler"
  level = (parameterizations.vp_by_sigma if by_sigma else parameterizations.vp)(abar)
  return parameterizations.denoiser(
    predict, schedule.kind, level, clip=schedule.clip, excess=excess
  )


def trigflow(
  predict: Callable[[Array, Array, Cond], Array],
  schedule: Schedule | FlowSchedule,
  data_std: float,
) -> NetFn:
  """Returns a network as a TrigFlow network, by the exact change of variables.

  What belongs to the sampler and not to the network is left out: the clip of x0, and the
  shift of the levels of rectified flow.

  Args:
    predict: (x [N, ...], timestep [N], cond) -> prediction [N, ...].
    schedule: the process.
    data_std: standard deviation of the data in the unit of the network.

  Example:
    >>> flow = from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    >>> net = trigflow(lambda x, time, cond: -x, flow, 1.0)
    >>> net(jnp.ones((1, 2)), jnp.zeros(1), None).tolist()
    [[0.0, 0.0]]
  """
  if isinstance(schedule, FlowSchedule):
    steps = schedule.train_steps
    return parameterizations.trigflow_from_flow(predict, steps, data_std)
  abar = schedule.abar
  return parameterizations.trigflow_from_vp(predict, schedule.kind, abar, data_std)
