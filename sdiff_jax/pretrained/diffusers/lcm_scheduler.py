"""The scheduler of latent consistency models, LCMScheduler of diffusers.

The network is one of noise or v, from whose estimate d of x0 the consistency function
f = c_skip x + c_out d is made (arXiv:2310.04378, appendix C).
"""

from typing import Annotated, NamedTuple

import numpy as np
from msgspec import Meta

from sdiff_jax.pretrained.files.config_fields import Field, Positive
from sdiff_jax.samplers.tableau import SolverTableau

SOLVER = "consistency"
FIELDS = {
  "original_inference_steps": Field(50, Annotated[int, Meta(ge=1, le=100_000)]),
  "timestep_scaling": Field(10.0, Positive),
}
STD = 0.5  # of the data in c_skip and c_out


class Boundary(NamedTuple):
  """How LCM chooses timesteps, and f(x, 0) = x.

  Attributes:
    steps: of the sampler that it was distilled for.
    scaling: factor of the timestep in c_skip and c_out.
  """

  steps: int
  scaling: float


def timesteps(boundary: Boundary, train_steps: int, steps: int) -> np.ndarray:
  """Returns the timestep at the start of each step, int [N].

  Args:
    boundary: of LCM.
    train_steps: number of training steps.
    steps: number of steps N.

  Raises:
    ValueError: more steps than the sampler that it was distilled for.

  Example:
    >>> timesteps(Boundary(50, 10.0), 1000, 4)
    array([999, 759, 499, 259])
  """
  count = boundary.steps
  if not 1 <= steps <= count or count > train_steps:
    raise ValueError(
      f"steps={steps}: must be in 1 to original_inference_steps={count} of LCMScheduler, "
      f"which must be at most num_train_timesteps={train_steps}"
    )
  known = np.arange(count, 0, -1) * (train_steps // count) - 1
  return known[np.floor(np.linspace(0, count, steps, endpoint=False)).astype(int)]


def with_boundary(boundary: Boundary, table: SolverTableau) -> SolverTableau:
  """Returns the table x' = alpha' (c_skip x + c_out d) + sigma' z.

  Args:
    boundary: of LCM.
    table: x' = alpha' d + sigma' z, at the timesteps of LCM.

  Example:
    >>> from sdiff_jax.diffusion import noise_schedules
    >>> from sdiff_jax.samplers import solvers
    >>> schedule = noise_schedules.vp(np.array([0.9, 0.5]), np.array([1, 0]))
    >>> table = solvers.from_schedule(SOLVER, schedule)
    >>> with_boundary(Boundary(2, 10.0), table).x_coef[:, 0].round(4)
    array([0.0024, 1.    ])
  """
  scaled = boundary.scaling * table.time[:, None]
  skip = STD**2 / (scaled**2 + STD**2)
  out = scaled / (scaled**2 + STD**2) ** 0.5
  d = table.denoised_coef
  x_coef = np.append(d * skip, np.zeros_like(skip), axis=1)
  return table._replace(x_coef=x_coef, denoised_coef=d * out, end_time=None)
