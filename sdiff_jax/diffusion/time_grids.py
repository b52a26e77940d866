"""Angles to train at, angles to sample at, and the warm-up of the tangent."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.types import Array, PRNGKey

SIGMA_MAX = 80.0  # the noise that EDM and sCM start from
SIGMA_MIN = 0.002


def log_normal(
  key: PRNGKey, batch: int, *, p_mean: float, p_std: float, sigma_d: float
) -> Array:
  """Draws training angles t = arctan(e^tau / sigma_d), tau ~ N(p_mean, p_std^2).

  Args:
    key: random key.
    batch: number of angles B.
    p_mean: mean of ln(sigma_d tan t).
    p_std: standard deviation of ln(sigma_d tan t).
    sigma_d: standard deviation of the data.

  Returns:
    float32 [B] in (0, pi/2) (arXiv:2410.11081, algorithm 1).
  """
  tau = p_mean + p_std * jax.random.normal(key, (batch,), jnp.float32)
  return jnp.arctan(jnp.exp(tau) / sigma_d)


def warmup(step: Array, steps: int) -> Array:
  """Returns r = min(1, step / steps), 1 where steps is 0 (section 4.2)."""
  return jnp.minimum(1.0, step / steps) if steps else jnp.float32(1.0)


def karras(
  steps: int,
  *,
  sigma_min: float = SIGMA_MIN,
  sigma_max: float = SIGMA_MAX,
  rho: float = 7.0,
) -> np.ndarray:
  """Returns EDM's noise levels, float64 [steps + 1], falling, the last one 0.

  sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
  (arXiv:2206.00364, eq. 5). One step goes from sigma_max to 0.
  """
  ramp = np.linspace(0, 1, steps) if steps > 1 else np.zeros(1)
  low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
  return np.append((high + ramp * (low - high)) ** rho, 0.0)


def karras_angles(steps: int, sigma_d: float) -> np.ndarray:
  """Returns arctan(sigma_i / sigma_d) of `karras(steps)`, float64 [steps + 1]."""
  return np.arctan(karras(steps) / sigma_d)


def uniform_angles(steps: int, sigma_d: float) -> np.ndarray:
  """Returns equally spaced angles from arctan(80 / sigma_d) to 0, float64 [steps + 1].

  As a variance-preserving process, the cosine schedule.
  """
  return np.linspace(np.arctan(SIGMA_MAX / sigma_d), 0.0, steps + 1)


def consistency_angles(steps: int, sigma_d: float) -> np.ndarray:
  """Returns the angles of consistency sampling, float64 [steps + 1], the last one 0.

  One step: arctan(80 / sigma_d). Two: 1.1 after it (arXiv:2410.11081, appendix G).
  More: equally spaced between that start and 0.
  """
  grid = uniform_angles(steps, sigma_d)
  return np.array([grid[0], 1.1, 0.0]) if steps == 2 else grid


def given_timesteps(angles: Sequence[float]) -> np.ndarray:
  """Returns the listed angles and a final 0, float64; 1.5708 stands for pi/2.

  Raises:
    ValueError: the angles do not fall, or leave (0, pi/2].
  """
  grid = np.append(np.asarray(angles, np.float64), 0.0)
  if not (grid[0] <= 1.5708 and np.all(np.diff(grid) < 0)):
    raise ValueError(
      f"timesteps={tuple(angles)}: give falling angles in (0, pi/2 = 1.5708]"
    )
  return np.minimum(grid, np.pi / 2)
