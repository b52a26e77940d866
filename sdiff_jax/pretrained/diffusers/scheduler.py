"""Noise schedules of published models, as their scheduler_config.json has them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sdiff_jax.diffusion import noise_schedules, parameterizations
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.samplers import solvers
from sdiff_jax.samplers.solvers import SolverTableau
from sdiff_jax.types import Array, Denoiser

PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS = {
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
SUPPORTED_VALUES = {
  "rescale_betas_zero_snr": UNSUPPORTED_FIELDS,
  "thresholding": UNSUPPORTED_FIELDS,
}
CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
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
  **{
    f"use_{name}": UNSUPPORTED_FIELDS
    for name in (
      *("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas"),
      *("flow_sigmas", "dynamic_shifting"),
    )
  },
  "euler_at_final": UNSUPPORTED_FIELDS,
}
EULER_SUPPORTED_VALUES = {
  "interpolation_type": ("linear",),
  "timestep_type": ("discrete",),
  "final_sigmas_type": ("zero",),
  "sigma_min": UNSUPPORTED_FIELDS,
  "sigma_max": UNSUPPORTED_FIELDS,
  **{f"use_{n}_sigmas": UNSUPPORTED_FIELDS for n in ("karras", "exponential", "beta")},
}
# class -> defaults and only values of its own fields
CLASSES = {
  "DDIM": (CLIP | {"set_alpha_to_one": True}, {}),
  "DDPM": (CLIP | {"variance_type": "fixed_small"}, {}),
  "PNDM": ({"set_alpha_to_one": False}, {}),
  "DPMSolverMultistep": (DPM_DEFAULTS, DPM_SUPPORTED_VALUES),
  "EulerDiscrete": ({"timestep_spacing": "linspace"}, EULER_SUPPORTED_VALUES),
}
IGNORED_FIELDS = {"dynamic_thresholding_ratio", "sample_max_value", "skip_prk_steps"}
IGNORED_FIELDS |= {"time_shift_type"}
VARIANCES = {
  **{"fixed_small": "ddpm", "fixed_small_log": "ddpm"},
  **{"fixed_large": "ddpm_large", "fixed_large_log": "ddpm_large"},
}
ORDERS = {2: "dpmpp2m", 3: "dpmpp3m"}


class Schedule(NamedTuple):
  """The process of a published model, and how it is meant to be solved.

  Attributes:
    abar: alpha^2 at each timestep, float64 [T].
    kind: what the network predicts, a key of `predictions.KINDS`.
    solver: a key of `tables.SOLVERS`.
    spacing: of the timesteps (see `paths.timesteps`).
    offset: of "leading" timesteps.
    last: alpha^2 at the end.
    clip: range of x0 in a denoiser, or 0.
  """

  abar: np.ndarray
  kind: str
  solver: str
  spacing: str
  offset: int
  last: float
  clip: float


def from_config(config: dict[str, Any]) -> Schedule:
  """Returns the schedule of a scheduler_config.json.

  PNDM's solver is not among ours: its schedule is solved by DDIM; so is Euler's, of
  which DDIM is the same step.

  Raises:
    ValueError: a class, fields or values that are not known, all of them listed.
  """
  name = config.get("_class_name", "")
  short = name.removesuffix("Scheduler").removesuffix("Parallel")
  if short not in CLASSES:
    known = ", ".join(f"{k}Scheduler" for k in CLASSES)
    raise ValueError(f"_class_name={name!r}: take one of {known}")
  defaults, only = CLASSES[short]
  # A file that was written for one class is given to another, whose fields stay.
  others = {k for pair in CLASSES.values() for part in pair for k in part}
  unused = IGNORED_FIELDS | others - defaults.keys() - only.keys() - DEFAULTS.keys()
  c = config_fields.validated_config(
    config, DEFAULTS | defaults, SUPPORTED_VALUES | only, unused
  )
  for field, words in (("prediction_type", PREDICTION_TYPES), ("beta_schedule", BETAS)):
    if c[field] not in words:
      raise ValueError(f"{field}={c[field]!r}: take one of {', '.join(words)}")
  abar = _abar(c)
  to_one = c.get("set_alpha_to_one", c.get("final_sigmas_type", "zero") == "zero")
  return Schedule(
    abar,
    PREDICTION_TYPES[c["prediction_type"]],
    _solver(c),
    c["timestep_spacing"],
    c["steps_offset"],
    1.0 if to_one else float(abar[0]),
    c.get("clip_sample", False) * c.get("clip_sample_range", 1.0),
  )


def _abar(c: dict[str, Any]) -> np.ndarray:
  if c["trained_betas"] is not None:
    return np.cumprod(1 - np.asarray(c["trained_betas"], np.float64))
  return noise_schedules.alphas_cumprod(
    BETAS[c["beta_schedule"]],
    c["num_train_timesteps"],
    start=c["beta_start"],
    end=c["beta_end"],
  )


def _solver(c: dict[str, Any]) -> str:
  """Returns the solver that a config names, of ours."""
  if "variance_type" in c:
    if c["variance_type"] not in VARIANCES:
      words = ", ".join(VARIANCES)
      raise ValueError(f"variance_type={c['variance_type']!r}: take one of {words}")
    return VARIANCES[c["variance_type"]]
  if "algorithm_type" not in c:
    return "ddim"
  order = c["solver_order"]
  if c["algorithm_type"] == "sde-dpmsolver++" and order == 2:
    return "dpmpp2m_sde"
  if c["algorithm_type"] != "dpmsolver++" or order not in ORDERS:
    raise ValueError(
      f"algorithm_type={c['algorithm_type']!r}, solver_order={order}: take "
      f"'dpmsolver++' of order {', '.join(map(str, ORDERS))}, or 'sde-dpmsolver++' of 2"
    )
  return ORDERS[order]


def table(schedule: Schedule, steps: int, solver: str = "") -> SolverTableau:
  """Returns the table of a solver at the timesteps that a schedule prescribes for it.

  Args:
    schedule: the process.
    steps: number of steps.
    solver: a key of `tables.SOLVERS`; "" for the schedule's own.

  Raises:
    ValueError: an unknown solver, or steps that do not fit.
  """
  solver = solver or schedule.solver
  if solver not in solvers.SOLVERS:
    raise ValueError(f"name={solver!r}: take one of {[*solvers.SOLVERS]}")
  abar, spacing, last = schedule.abar, schedule.spacing, schedule.last
  T, ends = len(abar), None
  if solver.startswith("dpmpp") and spacing != "trailing":
    # One point more than steps, and the process ends in the last.
    at = noise_schedules.timesteps(T, steps + 1, spacing, schedule.offset)[:-1]
  else:
    at = noise_schedules.timesteps(T, steps, spacing, schedule.offset)
  if solver == "ddim":
    ends = at - T // steps
  if solver.startswith("ddpm"):
    last = 1.0
  return solvers.SOLVERS[solver][0](noise_schedules.vp(abar, at, ends=ends, last=last))


def denoiser(
  predict: Callable[..., Array],
  schedule: Schedule,
  table: SolverTableau,
  solver: str = "",
) -> Denoiser:
  """Returns the denoiser of a network for a table of its schedule.

  Where DDIM clips x0, diffusers keeps the noise of before the clip:

      x' = alpha' clip(d) + sigma' (x - alpha d) / sigma,

  which is a row a x + b D of the table with D = clip(d) + (alpha a / b) (clip(d) - d).

  Args:
    predict: (x [N, ...], time [N], cond) -> prediction [N, ...].
    schedule: the process.
    table: what `table` returned.
    solver: as there.
  """
  excess = None
  if schedule.clip and (solver or schedule.solver) == "ddim":
    weight = table.alpha * table.a / table.b

    def excess(time: Array) -> Array:
      at, values = (jnp.asarray(v[::-1], time.dtype) for v in (table.time, weight))
      return jnp.interp(time, at, values)

  level = parameterizations.vp(schedule.abar)
  return parameterizations.denoiser(
    predict, schedule.kind, level, clip=schedule.clip, excess=excess
  )
