"""The schedulers of diffusers whose process is that of flow matching.

They differ in their noise levels, and in what a step does:

* FlowMatchEulerDiscreteScheduler: Euler's method, or with stochastic_sampling fresh noise.
* FlowMapEulerDiscreteScheduler: jumps of a network of two times.
* DPMSolverMultistepScheduler with use_flow_sigmas: DPM-Solver++.
* SCMScheduler: a consistency model in TrigFlow, whose states are those of flow matching
  divided by the length of (1 - sigma, sigma).
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from sdiff_jax.pretrained.diffusers import dpm_solver, flow_schedule, sigma_grids
from sdiff_jax.pretrained.diffusers.flow_schedule import FlowSchedule, Shift
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Field, Positive
from sdiff_jax.types import Json

CLASS_NAME = "FlowMatchEulerDiscreteScheduler"
Tokens = Annotated[int, Meta(ge=1, le=1_000_000)]
Number = Annotated[float, Meta(ge=-100, le=100)]
FIELDS = {
  "num_train_timesteps": Field(1000, Annotated[int, Meta(ge=1, le=100_000)]),
  "shift": Field(1.0, Positive),
  "use_dynamic_shifting": Field(False, bool),
  "time_shift_type": Field("exponential", Literal["exponential", "linear"]),
  "base_shift": Field(0.5, Number),
  "max_shift": Field(1.15, Number),
  "base_image_seq_len": Field(256, Tokens),
  "max_image_seq_len": Field(4096, Tokens),
  "shift_terminal": Field(None, Annotated[float, Meta(ge=0, lt=1)] | None),
  "stochastic_sampling": Field(False, bool | None),
} | sigma_grids.FIELDS
SUPPORTED_VALUES = {
  "invert_sigmas": (None, False),
}

FLOW_MAP_NAME = "FlowMapEulerDiscreteScheduler"
FLOW_MAP_FIELDS = {name: FIELDS[name] for name in ("num_train_timesteps", "shift")}

SCM_NAME = "SCMScheduler"
SCM_TIMES = 1.5708, 1.3  # of TrigFlow: the first one, and the second of two steps
SCM_FIELDS = {"prediction_type": Field("trigflow", Literal["trigflow"])}
# The standard deviation of the data cancels, and steps are given.
SCM_IGNORED_FIELDS = ("num_train_timesteps", "sigma_data")

DPM_FIELDS = dpm_solver.FIELDS | {
  "num_train_timesteps": FIELDS["num_train_timesteps"],
  "flow_shift": Field(1.0, Positive),
  "prediction_type": Field("epsilon", Literal["flow_prediction"]),
  "solver_order": Field(2, Literal[2, 3]),
}
UNSUPPORTED_FIELDS = (None, False)
DPM_SUPPORTED_VALUES = {
  "use_flow_sigmas": (True,),
  "algorithm_type": ("dpmsolver++",),
  "solver_type": ("midpoint",),
  "final_sigmas_type": ("zero",),
  "lambda_min_clipped": (-np.inf,),
  **{
    name: UNSUPPORTED_FIELDS
    for name in (
      *("thresholding", "variance_type", "use_dynamic_shifting"),
      *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
      *("use_lu_lambdas", "rescale_betas_zero_snr"),
    )
  },
}
DPM_IGNORED_FIELDS = (  # of a process with betas
  *("beta_start", "beta_end", "beta_schedule", "trained_betas", "timestep_spacing"),
  *("steps_offset", "dynamic_thresholding_ratio", "sample_max_value"),
  "time_shift_type",
)


def from_config(config: dict[str, Json]) -> FlowSchedule:
  """Returns the schedule of a FlowMatchEulerDiscreteScheduler (see `scheduler`).

  Example:
    >>> schedule = from_config({"shift": 3.0})
    >>> flow_schedule.sigmas(schedule._replace(spacing="trailing"), 2)
    array([1.  , 0.75])
  """
  c = config_fields.validated_config(config, FIELDS, SUPPORTED_VALUES)
  least, most = c["base_image_seq_len"], c["max_image_seq_len"]
  if c["use_dynamic_shifting"] and least >= most:
    raise ValueError(
      f"base_image_seq_len={least}: must be below max_image_seq_len={most}"
    )
  smallest, shift = 1 / c["num_train_timesteps"], _dynamic_shift(c)
  if not c["use_dynamic_shifting"]:
    # As in diffusers, the last training level is shifted, and then shifted again.
    shift = flow_schedule.shift_by(c["shift"])
    smallest = float(shift(0)(np.array(smallest)))
  return FlowSchedule(
    c["num_train_timesteps"],
    smallest,
    shift,
    terminal=c["shift_terminal"] or 0.0,
    grid=sigma_grids.chosen(c),
    # Each step adds fresh noise to the estimate of x0.
    solver="consistency" if c["stochastic_sampling"] else "ddim",
  )


def _dynamic_shift(c: dict[str, Json]) -> Shift:
  """Returns the shift by the number of tokens that the fields of a config determine."""

  def factor(tokens: int) -> float:
    least, most = c["base_image_seq_len"], c["max_image_seq_len"]
    slope = (c["max_shift"] - c["base_shift"]) / (most - least)
    mu = c["base_shift"] + slope * (tokens - least)
    factor = math.exp(mu) if c["time_shift_type"] == "exponential" else mu
    if factor <= 0:
      raise ValueError(f"base_shift={c['base_shift']}: makes the shift {factor:.3g}")
    return factor

  return lambda tokens: flow_schedule.shift_by(factor(tokens))(tokens)


def from_flow_map_config(config: dict[str, Json]) -> FlowSchedule:
  """Returns the schedule of a FlowMapEulerDiscreteScheduler (see `scheduler`).

  A step is x - (sigma - sigma') u, where the network of two times predicts u, the average
  velocity between them. For a network of one time this is Euler's method.

  Example:
    >>> flow_schedule.sigmas(from_flow_map_config({"shift": 3.0}), 2)
    array([1.  , 0.75])
  """
  c = config_fields.validated_config(config, FLOW_MAP_FIELDS, {})
  return FlowSchedule(
    c["num_train_timesteps"],
    1 / c["num_train_timesteps"],
    flow_schedule.shift_by(c["shift"]),
    solver="flow_map",
    spacing="trailing",
  )


def from_dpm_config(config: dict[str, Json]) -> FlowSchedule:
  """Returns the schedule of a DPMSolverMultistepScheduler with use_flow_sigmas.

  Example:
    >>> fields = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    >>> flow_schedule.sigmas(from_dpm_config(fields), 2)
    array([0.999 , 0.4995])
  """
  c = config_fields.validated_config(
    config,
    DPM_FIELDS,
    DPM_SUPPORTED_VALUES,
    DPM_IGNORED_FIELDS,
    required=("prediction_type",),
  )
  smallest = 1 / c["num_train_timesteps"]
  return FlowSchedule(
    c["num_train_timesteps"],
    smallest,
    flow_schedule.shift_by(c["flow_shift"]),
    solver=f"dpmpp{c['solver_order']}m",
    spacing="trailing",
    first=1 - smallest,
    whole=True,
    final_orders=dpm_solver.final_orders(c),
  )


def from_scm_config(config: dict[str, Json]) -> FlowSchedule:
  """Returns the schedule of an SCMScheduler, for SANA-Sprint (arXiv:2503.09641).

  In its network's variables, a step from x with the estimate d of x0 to the level s is
  (1 - s) d + s eps: multistep sampling of a consistency model.

  Example:
    >>> flow_schedule.sigmas(from_scm_config({}), 2).round(3)
    array([1.   , 0.783])
  """
  config_fields.validated_config(config, SCM_FIELDS, {}, SCM_IGNORED_FIELDS)
  return FlowSchedule(1, 0.0, solver="consistency", levels=_scm_levels)


def _scm_levels(steps: int) -> np.ndarray:
  """Returns tan(t) / (1 + tan(t)) at the times of TrigFlow of an SCMScheduler."""
  first, second = SCM_TIMES
  times = np.linspace(first, 0, steps + 1)[:-1]
  times = np.array([first, second]) if steps == 2 else times
  return np.sin(times) / (np.cos(times) + np.sin(times))


# Class -> (content of a scheduler_config.json) -> schedule.
READERS: dict[str, Callable[[dict[str, Json]], FlowSchedule]] = {
  CLASS_NAME: from_config,
  FLOW_MAP_NAME: from_flow_map_config,
  SCM_NAME: from_scm_config,
}
