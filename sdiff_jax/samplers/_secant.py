"""How a denoiser changes with its state, dd/dx, as the passes of a window tell it.

One number for each element of a state: what its last change did to d, within the
bounds that a true denoiser has. It costs no evaluation. A state that is new to the
window has changed nothing yet; it takes that of Gaussian data, of the variance that
the states before it show.
"""

from typing import Any

import jax.numpy as jnp

from sdiff_jax.samplers._ring_buffer import gather_slot, wide
from sdiff_jax.types import Array

LEAST = 1e-3  # distance of alpha dd/dx from 1, where its variance is infinite
MOST = 100.0  # the largest spread
ULPS = (
  100  # a change below so many units in the last place is rounding, and tells nothing
)


def estimate_slopes(now: Any, k: Array, row: dict, d: Array) -> tuple[Array, Array]:
  """Returns dd/dx = (d - d_before) / (x - x_before), within [0, 1 / alpha].

  New states have that of Gaussian data whose variance is `spread` times the data's,

      alpha dd/dx = o / (1 + o),    o = spread alpha gain / (1 - alpha gain).

  Args:
    now: the window, with x and those before, and how many states were seen before.
    k: rank of a slot, int32 [B, W].
    row: columns of the table, [B, W, 1, ...].
    d: the denoiser at x, [B, W, ...].

  Returns:
    dd/dx by element [B, W, ...], and the spread [B, 1, ...] that the last state that
    is not new shows, its dd/dx taken as one number, <dx, dd> / <dx, dx>.
  """
  alpha, seen = row["alpha"], now.seen[:, None]
  dx, dd = now.x - now.before[0], d - now.before[1]
  share = alpha * row["gain"]
  odds = share / jnp.maximum(1 - share, LEAST)
  guess = now.spread[:, None] * odds
  guess = guess / ((1 + guess) * alpha)
  # Where a change is little more than rounding, the guess weighs as much.
  rounding = ULPS * jnp.finfo(d.dtype).eps * (jnp.abs(now.x) + jnp.abs(d))
  known = wide(k < seen, d.ndim) & (dx != 0)
  total = jnp.where(known, dx**2 + rounding**2, 1)
  slope = jnp.where(known, (dx * dd + rounding**2 * guess) / total, guess)
  last, axes = k == seen - 1, tuple(range(1, dx.ndim - 1))
  dot, square = (
    jnp.sum(gather_slot(dx * v, last), axes, keepdims=True) for v in (dd, dx)
  )
  share = gather_slot(alpha, last) * dot / jnp.where(square > 0, square, 1)
  share = jnp.clip(share, 0, 1 - LEAST)
  spread = share / (1 - share) / jnp.maximum(gather_slot(odds, last), LEAST)
  spread = jnp.where(square > 0, jnp.minimum(spread, MOST), now.spread)
  return jnp.clip(slope, 0, 1 / alpha), spread
