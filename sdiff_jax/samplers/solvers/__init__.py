"""Solvers of the reverse process: one file for each family.

A solver is a function `NoiseSchedule -> SolverTableau` that registers itself under the
kind "samplers.solvers", with its default timesteps:

    @registry.register("samplers.solvers", "ddim", timesteps=time_grids.uniform_timesteps)
    def ddim(schedule: NoiseSchedule, eta: float = 0.0) -> SolverTableau: ...

Its further arguments are its options; those with the default None are not fields of a
config.
"""

from typing import Annotated

from sdiff_jax import fields, registry
from sdiff_jax.diffusion import noise_schedules, time_grids
from sdiff_jax.diffusion.noise_schedules import NoiseSchedule
from sdiff_jax.fields import NotNegative, Positive, Range, Timesteps
from sdiff_jax.samplers.tableau import SolverTableau
from sdiff_jax.types import Json

__all__ = ["build", "from_schedule", "names", "options"]

KIND = "samplers.solvers"
Steps = Annotated[int, Range(1, 100_000)]


def names() -> list[str]:
  """Returns the names of all solvers, sorted.

  Example:
    >>> {"ddim", "ddpm", "heun"} <= set(names())
    True
  """
  return registry.names(KIND)


def _lookup(name: str) -> registry.Piece:
  if name not in names():
    raise ValueError(f"name={name!r}: must be one of {', '.join(names())}")
  return registry.lookup(KIND, name)


def options(name: str) -> dict[str, Json]:
  """Returns the options of a solver with their defaults.

  Args:
    name: a solver (see `names`).

  Raises:
    ValueError: an unknown name.

  Example:
    >>> options("ddim")
    {'eta': 0.0}
  """
  _lookup(name)
  return registry.fields(KIND, name)


def from_schedule(name: str, schedule: NoiseSchedule, **given: Json) -> SolverTableau:
  """Returns the tableau of a solver on a noise schedule.

  Args:
    name: a solver (see `names`).
    schedule: the noise level at each step.
    **given: options of the solver (see `options`), or its arguments with the default
      None.

  Raises:
    ValueError: an unknown name, an option that the solver does not have, or a value
      that it refuses.

  Example:
    >>> import numpy as np
    >>> schedule = noise_schedules.edm(np.array([2.0, 1.0, 0.0]))
    >>> from_schedule("ddim", schedule).x_coef[:, 0]
    array([0.5, 0. ])
  """
  piece, known = _lookup(name), options(name)
  arguments = registry.required(KIND, name)
  for option, value in given.items():
    if option not in known and option not in arguments:
      raise ValueError(
        f"{option}={value!r}: the solver {name!r} has no such option; it has "
        f"{', '.join(known) or 'none'}"
      )
  return piece.build(schedule, **given)


@fields.checked
def build(
  *,
  sigma_d: Positive,
  name: str,
  steps: Steps,
  timesteps: Timesteps = (),
  temperature: NotNegative = 1.0,
  **given: Json,
) -> SolverTableau:
  """Returns the tableau of a solver on the TrigFlow process.

  Args:
    sigma_d: standard deviation of the data.
    name: a solver (see `names`).
    steps: number of steps of the noise schedule; heun, dpm2s and edm_stochastic evaluate
      the denoiser 2 steps - 1 times.
    timesteps: TrigFlow time at the start of every step, in (0, pi/2], instead of the
      solver's own grid.
    temperature: factor of the first state and of all noise; below 1, samples stay closer
      to the modes (low-temperature sampling, arXiv:2211.15657).
    **given: options of the solver (see `options`).

  Raises:
    ValueError: an unknown name or option, or a value that does not fit.

  Example:
    >>> tableau = build(sigma_d=0.5, name="heun", steps=4)
    >>> tableau.evaluations
    7
  """
  grid = _lookup(name).facts["timesteps"]
  t = time_grids.from_list(timesteps) if timesteps else grid(steps, sigma_d)
  schedule = noise_schedules.trigflow(t, sigma_d)
  return from_schedule(name, schedule, **given).scaled(temperature)
