"""Distributions of training times, time grids of samplers, and the tangent's warm-up.

Times are TrigFlow times t in [0, pi/2], where sigma_d tan(t) is the noise level of EDM.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.types import Array, PRNGKey

SIGMA_MAX = 80.0  # the highest noise level of EDM and of sCM
SIGMA_MIN = 0.002


def log_normal(
  key: PRNGKey, batch: int, *, p_mean: float, p_std: float, sigma_d: float
) -> Array:
  """Draws training times t = arctan(e^tau / sigma_d), tau ~ N(p_mean, p_std^2).

  Args:
    key: random key.
    batch: number of times B.
    p_mean: mean of ln(sigma_d tan t).
    p_std: standard deviation of ln(sigma_d tan t).
    sigma_d: standard deviation of the data.

  Returns:
    Times in (0, pi/2), float32 [B] (arXiv:2410.11081, algorithm 1).

  Example:
    >>> log_normal(jax.random.key(0), 3, p_mean=-1.0, p_std=1.4, sigma_d=0.5).shape
    (3,)
  """
  tau = p_mean + p_std * jax.random.normal(key, (batch,), jnp.float32)
  return jnp.arctan(jnp.exp(tau) / sigma_d)


def warmup(step: Array, steps: int) -> Array:
  """Returns r = min(1, step / steps) (arXiv:2410.11081, section 4.2).

  Args:
    step: number of training steps so far, int32 scalar.
    steps: length of the warm-up; 0 for none, where r = 1.

  Example:
    >>> float(warmup(jnp.int32(25), 100))
    0.25
  """
  return jnp.minimum(1.0, step / steps) if steps else jnp.float32(1.0)


def karras(
  steps: int,
  *,
  sigma_min: float = SIGMA_MIN,
  sigma_max: float = SIGMA_MAX,
  rho: float = 7.0,
) -> np.ndarray:
  """Returns EDM's noise levels, decreasing, with a last one of 0.

  sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
  (arXiv:2206.00364, eq. 5). A single step goes from sigma_max to 0.

  Args:
    steps: number of steps N.
    sigma_min: the lowest noise level above 0.
    sigma_max: the highest noise level.
    rho: exponent; larger values place more steps at low noise.

  Returns:
    Noise levels, float64 [N + 1].

  Example:
    >>> karras(3).round(3)
    array([8.000e+01, 2.515e+00, 2.000e-03, 0.000e+00])
  """
  ramp = np.linspace(0, 1, steps) if steps > 1 else np.zeros(1)
  low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
  return np.append((high + ramp * (low - high)) ** rho, 0.0)


def karras_timesteps(steps: int, sigma_d: float) -> np.ndarray:
  """Returns arctan(sigma_i / sigma_d) of the noise levels of `karras`.

  Args:
    steps: number of steps N.
    sigma_d: standard deviation of the data.

  Returns:
    TrigFlow times, decreasing to 0, float64 [N + 1].

  Example:
    >>> karras_timesteps(2, 0.5).round(3)
    array([1.565, 0.004, 0.   ])
  """
  return np.arctan(karras(steps) / sigma_d)


def uniform_timesteps(steps: int, sigma_d: float) -> np.ndarray:
  """Returns equally spaced times from arctan(80 / sigma_d) to 0.

  For a variance-preserving process they are the cosine schedule.

  Args:
    steps: number of steps N.
    sigma_d: standard deviation of the data.

  Returns:
    TrigFlow times, decreasing to 0, float64 [N + 1].

  Example:
    >>> uniform_timesteps(2, 0.5).round(3)
    array([1.565, 0.782, 0.   ])
  """
  return np.linspace(np.arctan(SIGMA_MAX / sigma_d), 0.0, steps + 1)


def consistency_timesteps(steps: int, sigma_d: float) -> np.ndarray:
  """Returns the times of consistency sampling.

  One step starts at arctan(80 / sigma_d). Two steps have 1.1 after it
  (arXiv:2410.11081, appendix G). More steps are equally spaced from that start to 0.

  Args:
    steps: number of steps N.
    sigma_d: standard deviation of the data.

  Returns:
    TrigFlow times, decreasing to 0, float64 [N + 1].

  Example:
    >>> consistency_timesteps(2, 0.5).round(3)
    array([1.565, 1.1  , 0.   ])
  """
  grid = uniform_timesteps(steps, sigma_d)
  return np.array([grid[0], 1.1, 0.0]) if steps == 2 else grid


def from_list(timesteps: Sequence[float]) -> np.ndarray:
  """Returns the given start times of steps and a final 0.

  Args:
    timesteps: TrigFlow time at the start of each of N steps, decreasing, in (0, pi/2];
      1.5708 stands for pi/2.

  Returns:
    TrigFlow times, float64 [N + 1].

  Raises:
    ValueError: the times do not decrease, or are not in (0, pi/2].

  Example:
    >>> from_list([1.5, 0.5])
    array([1.5, 0.5, 0. ])
  """
  grid = np.append(np.asarray(timesteps, np.float64), 0.0)
  if not (grid[0] <= 1.5708 and np.all(np.diff(grid) < 0)):
    raise ValueError(
      f"timesteps={tuple(timesteps)}: must decrease, in (0, pi/2 = 1.5708]"
    )
  return np.minimum(grid, np.pi / 2)
