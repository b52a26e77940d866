"""The noise levels of flow matching, FlowMatchEulerDiscreteScheduler of diffusers.

The process is x = (1 - sigma) x0 + sigma eps; the network is given the timestep
T sigma and predicts eps - x0. Levels between 1 and 0 are shifted towards noise, by a
constant or by the number of tokens of the image (arXiv:2403.03206, section 5.3.2).
DPMSolverMultistepScheduler with use_flow_sigmas has the same process, and so has
SCMScheduler, whose states are those of flow matching divided by the length of
(1 - sigma, sigma).
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from sdiff_jax.diffusion import noise_schedules, parameterizations
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.pretrained.diffusers import sigma_grids
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Field, Positive
from sdiff_jax.samplers.tableau import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, Json

CLASS_NAME = "FlowMatchEulerDiscreteScheduler"
SPACINGS = ("linspace", "trailing")
ROUNDING = 1e-3  # a whole timestep may be less by an error of float32
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


SCM_NAME = "SCMScheduler"
SCM_TIMES = 1.5708, 1.3  # of TrigFlow: the first one, and the second of two steps
SCM_FIELDS = {"prediction_type": Field("trigflow", Literal["trigflow"])}
# The standard deviation of the data cancels, and steps are given.
SCM_IGNORED_FIELDS = ("num_train_timesteps", "sigma_data")
DPM_FIELDS = {
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
  "lower_order_final": (True,),
  "final_sigmas_type": ("zero",),
  "lambda_min_clipped": (-np.inf,),
  **{
    name: UNSUPPORTED_FIELDS
    for name in (
      *("thresholding", "variance_type", "euler_at_final", "use_dynamic_shifting"),
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


class FlowSchedule(NamedTuple):
  """The process of a flow-matching model, and how it is meant to be solved.

  Attributes:
    shift: number of tokens -> map of the levels before the shift to those after.
    terminal: the last level above 0, that the others are stretched to; 0 for none.
    grid: levels between the first and the last, a key of `sigma_grids.GRIDS`; "" as
      they are.
    train_steps: T, the timestep of pure noise.
    tokens: number of tokens of an image, for a shift that depends on it.
    solver: a name of `solvers.names()`.
    spacing: of the levels before the shift: "linspace" from the first to the last
      training level, or "trailing" from 1 to 1 / N.
    smallest: the last training level.
    first: level at which sampling begins, before the shift.
    whole: whether timesteps are rounded down to whole ones.
    levels: number of steps -> all levels, for a scheduler with a grid of its own.
  """

  shift: Callable[[int], Callable[[np.ndarray], np.ndarray]]
  terminal: float
  grid: str
  train_steps: int
  smallest: float
  tokens: int = 4096
  solver: str = "ddim"
  spacing: str = "linspace"
  first: float = 1.0
  whole: bool = False
  levels: Callable[[int], np.ndarray] | None = None


def from_config(config: dict[str, Json]) -> FlowSchedule:
  """Returns the schedule of a scheduler_config.json.

  Args:
    config: the file's content.

  Raises:
    ValueError: fields or values that are not supported; all of them are listed.

  Example:
    >>> schedule = from_config({"shift": 3.0})
    >>> sigmas(schedule._replace(spacing="trailing"), 2)
    array([1.  , 0.75])
  """
  c = config_fields.validated_config(config, FIELDS, SUPPORTED_VALUES)
  least, most = c["base_image_seq_len"], c["max_image_seq_len"]
  if c["use_dynamic_shifting"] and least >= most:
    raise ValueError(
      f"base_image_seq_len={least}: must be below max_image_seq_len={most}"
    )
  smallest = 1 / c["num_train_timesteps"]
  if not c["use_dynamic_shifting"]:
    # As in diffusers, the last training level is shifted, and then shifted again.
    smallest = float(_shifted(np.array(smallest), c["shift"]))
  terminal, train_steps = c["shift_terminal"] or 0.0, c["num_train_timesteps"]
  # Each step adds fresh noise to the estimate of x0.
  solver = "consistency" if c["stochastic_sampling"] else "ddim"
  grid = sigma_grids.chosen(c)
  return FlowSchedule(_shift(c), terminal, grid, train_steps, smallest, solver=solver)


def from_dpm_config(config: dict[str, Json]) -> FlowSchedule:
  """Returns the schedule of a DPMSolverMultistepScheduler with use_flow_sigmas.

  Args:
    config: content of a scheduler_config.json.

  Raises:
    ValueError: fields or values that are not supported; all of them are listed.

  Example:
    >>> fields = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    >>> sigmas(from_dpm_config(fields), 2)
    array([0.999 , 0.4995])
  """
  c = config_fields.validated_config(
    config,
    DPM_FIELDS,
    DPM_SUPPORTED_VALUES,
    DPM_IGNORED_FIELDS,
    required=("prediction_type",),
  )
  shift, smallest = c["flow_shift"], 1 / c["num_train_timesteps"]
  return FlowSchedule(
    lambda tokens: lambda sigma: _shifted(sigma, shift),
    terminal=0.0,
    grid="",
    train_steps=c["num_train_timesteps"],
    smallest=smallest,
    solver=f"dpmpp{c['solver_order']}m",
    spacing="trailing",
    first=1 - smallest,
    whole=True,
  )


def from_scm_config(config: dict[str, Json]) -> FlowSchedule:
  """Returns the schedule of an SCMScheduler, for SANA-Sprint (arXiv:2503.09641).

  In its network's variables, a step from x with the estimate d of x0 to the level s is
  (1 - s) d + s eps: multistep sampling of a consistency model.

  Args:
    config: content of a scheduler_config.json.

  Raises:
    ValueError: fields or values that are not supported; all of them are listed.

  Example:
    >>> sigmas(from_scm_config({}), 2).round(3)
    array([1.   , 0.783])
  """
  config_fields.validated_config(config, SCM_FIELDS, {}, SCM_IGNORED_FIELDS)
  return FlowSchedule(
    lambda tokens: lambda sigma: sigma,
    terminal=0.0,
    grid="",
    train_steps=1,
    smallest=0.0,
    solver="consistency",
    levels=_scm_levels,
  )


def _scm_levels(steps: int) -> np.ndarray:
  """Returns tan(t) / (1 + tan(t)) at the times of TrigFlow of an SCMScheduler."""
  first, second = SCM_TIMES
  times = np.linspace(first, 0, steps + 1)[:-1]
  times = np.array([first, second]) if steps == 2 else times
  return np.sin(times) / (np.cos(times) + np.sin(times))


def _shift(c: dict[str, Json]) -> Callable[[int], Callable[[np.ndarray], np.ndarray]]:
  """Returns `FlowSchedule.shift` of the fields of a config."""

  def factor(tokens: int) -> float:
    if not c["use_dynamic_shifting"]:
      return c["shift"]
    least, most = c["base_image_seq_len"], c["max_image_seq_len"]
    slope = (c["max_shift"] - c["base_shift"]) / (most - least)
    mu = c["base_shift"] + slope * (tokens - least)
    factor = math.exp(mu) if c["time_shift_type"] == "exponential" else mu
    if factor <= 0:
      raise ValueError(f"base_shift={c['base_shift']}: makes the shift {factor:.3g}")
    return factor

  return lambda tokens: lambda sigma: _shifted(sigma, factor(tokens))


def _shifted(sigma: np.ndarray, factor: float) -> np.ndarray:
  """Returns factor sigma / (1 + (factor - 1) sigma)."""
  return factor * sigma / (1 + (factor - 1) * sigma)


def sigmas(schedule: FlowSchedule, steps: int) -> np.ndarray:
  """Returns the noise level at the start of each step, decreasing, float64 [N].

  Args:
    schedule: the process.
    steps: number of steps N.

  Raises:
    ValueError: a number of steps or a spacing that does not fit.

  Example:
    >>> sigmas(from_config({"num_train_timesteps": 4}), 4)
    array([1.  , 0.75, 0.5 , 0.25])
  """
  if steps < 1:
    raise ValueError(f"steps={steps}: must be at least 1")
  if schedule.spacing not in SPACINGS:
    raise ValueError(
      f"timestep_spacing={schedule.spacing!r}: must be one of {', '.join(SPACINGS)} for "
      f"{CLASS_NAME}"
    )
  if schedule.levels is not None:
    if schedule.spacing != FlowSchedule._field_defaults["spacing"]:
      raise ValueError(
        f"timestep_spacing={schedule.spacing!r}: {SCM_NAME} has a grid of its own"
      )
    return schedule.levels(steps)
  first = schedule.first
  last = schedule.smallest if schedule.spacing == "linspace" else first / steps
  levels = schedule.shift(schedule.tokens)(np.linspace(first, last, steps))
  if schedule.terminal:
    if steps == 1:
      raise ValueError(
        f"steps=1: must be at least 2 for shift_terminal of {CLASS_NAME}"
      )
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
    >>> noise_schedule(from_config({}), 2).time
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

  Args:
    predict: (x [N, ...], timestep [N], cond) -> prediction of eps - x0, [N, ...].
    schedule: the process.

  Example:
    >>> import jax.numpy as jnp
    >>> denoise = denoiser(lambda x, timestep, cond: x, from_config({}))
    >>> denoise(jnp.ones((1, 2)), jnp.array([0.25]), None)
    Array([[0.75, 0.75]], dtype=float32)
  """

  def call(x: Array, time: Array, cond: Cond) -> Array:
    timestep = schedule.train_steps * time
    if schedule.whole:
      timestep = jnp.floor(timestep + ROUNDING)
    return predict(x, timestep, cond)

  return parameterizations.denoiser(call, "flow", parameterizations.flow)
