"""Grids of noise levels sigma / alpha that are not those of timesteps, as in diffusers."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from sdiff_jax.diffusion import time_grids
from sdiff_jax.pretrained.files.config_fields import Field
from sdiff_jax.types import Array, Cond, Json

BETA = 0.6  # both parameters of the beta distribution


def _beta(first: float, last: float, steps: int) -> np.ndarray:
  """Returns quantiles of a beta distribution (arXiv:2407.12173)."""
  from scipy import special  # slow to import

  quantiles: np.ndarray = special.betaincinv(BETA, BETA, np.linspace(1, 0, steps))
  return last + (first - last) * quantiles


# Name -> (first level, last level, number of levels) -> levels.
GRIDS: dict[str, Callable[[float, float, int], np.ndarray]] = {
  "karras": lambda first, last, steps: time_grids.karras(
    steps, sigma_min=last, sigma_max=first
  )[:-1],
  "exponential": lambda first, last, steps: np.geomspace(first, last, steps),
  "beta": _beta,
  # Equal steps in ln(alpha / sigma) (arXiv:2206.00927).
  "lu": lambda first, last, steps: np.geomspace(first, last, steps),
}
NAMES = {name: f"use_{name}_sigmas" for name in GRIDS} | {"lu": "use_lu_lambdas"}
LU = {NAMES["lu"]: Field(False, bool | None)}  # of DPM-Solver alone
FIELDS = {name: Field(False, bool | None) for name in NAMES.values() if name not in LU}
ROUNDING = 1e-4  # a whole timestep may be less by an error of float32
# How the timestep of a level becomes a whole one.
WHOLE: dict[str, Callable[[Array], Array]] = {
  "": lambda time: time,
  "round": jnp.round,
  "floor": lambda time: jnp.floor(time + ROUNDING),
}


def chosen(c: dict[str, Json]) -> str:
  """Returns the grid that the fields of a config choose, "" for that of timesteps.

  Args:
    c: fields with their values; a class without grids has none of `FIELDS`.

  Raises:
    ValueError: they choose two.
  """
  names = [name for name in GRIDS if c.get(NAMES[name])]
  if len(names) > 1:
    raise ValueError(f"{NAMES[names[0]]}=True: not with {NAMES[names[1]]}=True")
  return "".join(names)


def whole(class_name: str, grid: str, beta_schedule: str) -> str:
  """Returns how a scheduler of diffusers rounds the timesteps of a grid.

  Args:
    class_name: without "Scheduler".
    grid: a key of `GRIDS`.
    beta_schedule: of the config.
  """
  if not grid or class_name == "EulerDiscrete":
    return ""
  cosine = class_name != "UniPCMultistep" and beta_schedule == "squaredcos_cap_v2"
  return "round" if grid in ("karras", "lu") and not cosine else "floor"


def levels(grid: str, first: float, last: float, steps: int) -> np.ndarray:
  """Returns decreasing noise levels, float64 [N].

  Args:
    grid: a key of `GRIDS`.
    first: the first and largest level.
    last: the last level, above 0.
    steps: number of levels N.

  Example:
    >>> levels("exponential", 8.0, 2.0, 3)
    array([8., 4., 2.])
  """
  return GRIDS[grid](first, last, steps)


def at_whole_timesteps(
  predict: Callable[[Array, Array, Cond], Array], how: str
) -> Callable[[Array, Array, Cond], Array]:
  """Returns a network that is given whole timesteps.

  Args:
    predict: (x [N, ...], timestep [N], cond) -> prediction [N, ...].
    how: a key of `WHOLE`.
  """
  return lambda x, time, cond: predict(x, WHOLE[how](time), cond)
