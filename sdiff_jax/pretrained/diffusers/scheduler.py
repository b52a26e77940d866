"""Noise schedules and solvers of published models, from their scheduler_config.json."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sdiff_jax.diffusion import noise_schedules, parameterizations
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.samplers import solvers
from sdiff_jax.samplers.tableau import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, Json

PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETA_SCHEDULES = {
  "linear": "linear",
  "scaled_linear": "scaled_linear",
  "squaredcos_cap_v2": "cosine",
}
UNSUPPORTED_FIELDS = (None, False)
DEFAULTS = {
  "num_train_timesteps": 1000,
  "beta_start": 0.0001,
  "beta_end": 0.02,
  "beta_schedule": "linear",
  "trained_betas": None,
  "prediction_type": "epsilon",
  "timestep_spacing": "leading",
  "steps_offset": 0,
}
SUPPORTED_VALUES = {"thresholding": UNSUPPORTED_FIELDS}
ZERO_SNR = {"rescale_betas_zero_snr": False}
CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
OTHER_GRIDS = {
  f"use_{name}": UNSUPPORTED_FIELDS
  for name in (
    *("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas"),
    *("flow_sigmas", "dynamic_shifting"),
  )
}
DPM_DEFAULTS = {
  "timestep_spacing": "linspace",
  "solver_order": 2,
  "algorithm_type": "dpmsolver++",
  "final_sigmas_type": "zero",
}
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
UNIPC_DEFAULTS = {
  "timestep_spacing": "linspace",
  "solver_order": 2,
  "final_sigmas_type": "zero",
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
# Class -> the defaults of its own fields, and the values that others of them may have.
CLASSES: dict[str, tuple[Mapping[str, Json], Mapping[str, tuple]]] = {
  "DDIM": (CLIP | ZERO_SNR | {"set_alpha_to_one": True}, {}),
  "DDPM": (CLIP | ZERO_SNR | {"variance_type": "fixed_small"}, {}),
  "PNDM": (
    {"set_alpha_to_one": False},
    {"rescale_betas_zero_snr": UNSUPPORTED_FIELDS},
  ),
  "DPMSolverMultistep": (ZERO_SNR | DPM_DEFAULTS, DPM_SUPPORTED_VALUES),
  "EulerDiscrete": (
    ZERO_SNR | {"timestep_spacing": "linspace"},
    EULER_SUPPORTED_VALUES,
  ),
  "UniPCMultistep": (ZERO_SNR | UNIPC_DEFAULTS, UNIPC_SUPPORTED_VALUES),
}
CLASS_NAMES = {f"{name}Scheduler": name for name in CLASSES}
CLASS_NAMES |= {f"{name}ParallelScheduler": name for name in ("DDIM", "DDPM")}
IGNORED_FIELDS = {"dynamic_thresholding_ratio", "sample_max_value", "skip_prk_steps"}
IGNORED_FIELDS |= {"time_shift_type"}
VARIANCES = {
  **{"fixed_small": "ddpm", "fixed_small_log": "ddpm"},
  **{"fixed_large": "ddpm_large", "fixed_large_log": "ddpm_large"},
}
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


def from_config(config: dict[str, Json]) -> Schedule:
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
  if name not in CLASS_NAMES:
    raise ValueError(f"_class_name={name!r}: must be one of {', '.join(CLASS_NAMES)}")
  defaults, supported = CLASSES[CLASS_NAMES[name]]
  # A file that was written for one class may be used by another; its fields stay there.
  others = {k for pair in CLASSES.values() for part in pair for k in part}
  unused = (
    IGNORED_FIELDS | others - defaults.keys() - supported.keys() - DEFAULTS.keys()
  )
  c = config_fields.validated_config(
    config, DEFAULTS | defaults, SUPPORTED_VALUES | supported, unused
  )
  for field, values in (
    ("prediction_type", PREDICTION_TYPES),
    ("beta_schedule", BETA_SCHEDULES),
  ):
    if c[field] not in values:
      raise ValueError(f"{field}={c[field]!r}: must be one of {', '.join(values)}")
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
    if c["variance_type"] not in VARIANCES:
      raise ValueError(
        f"variance_type={c['variance_type']!r}: must be one of {', '.join(VARIANCES)}"
      )
    return VARIANCES[c["variance_type"]]
  if "solver_order" not in c:
    return "ddim"
  algorithm, order = c.get("algorithm_type", "unipc"), c["solver_order"]
  if (algorithm, order) not in MULTISTEP:
    raise ValueError(
      f"algorithm_type={algorithm!r}, solver_order={order}: must be 'dpmsolver++' or "
      "UniPC with order 2 or 3, or 'sde-dpmsolver++' with order 2"
    )
  return MULTISTEP[algorithm, order]


def tableau(schedule: Schedule, steps: int, solver: str = "") -> SolverTableau:
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
  schedule: Schedule,
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
