"""The betas of published models, from their scheduler_config.json."""

from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from sdiff_jax.diffusion import noise_schedules
from sdiff_jax.pretrained.files.config_fields import Field, Fraction
from sdiff_jax.types import Json

SCHEDULES = {
  "linear": "linear",
  "scaled_linear": "scaled_linear",
  "squaredcos_cap_v2": "cosine",
}
MAX_TIMESTEPS = 100_000
Timesteps = Annotated[int, Meta(ge=1, le=MAX_TIMESTEPS)]
Betas = Annotated[
  list[Annotated[float, Meta(gt=0, le=1)]], Meta(min_length=1, max_length=MAX_TIMESTEPS)
]
FIELDS = {
  "num_train_timesteps": Field(1000, Timesteps),
  "beta_start": Field(0.0001, Fraction),
  "beta_end": Field(0.02, Fraction),
  "beta_schedule": Field("linear", Literal[tuple(SCHEDULES)]),
  "trained_betas": Field(None, Betas | None),
  "steps_offset": Field(0, Annotated[int, Meta(ge=0, lt=MAX_TIMESTEPS)]),
}


def check(c: dict[str, Json], config: dict[str, Json]) -> None:
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


def abar(c: dict[str, Json]) -> np.ndarray:
  """Returns alpha^2 at each training timestep; the last one may be 0."""
  if c["trained_betas"] is not None:
    levels = np.cumprod(1 - np.asarray(c["trained_betas"], np.float64))
  else:
    levels = noise_schedules.alphas_cumprod(
      SCHEDULES[c["beta_schedule"]],
      c["num_train_timesteps"],
      start=c["beta_start"],
      end=c["beta_end"],
    )
  if c.get("rescale_betas_zero_snr", False):
    levels = noise_schedules.rescale_zero_terminal_snr(levels)
  return levels
