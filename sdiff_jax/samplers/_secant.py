"""Estimates of dd/dx, the derivative of a denoised value by its state, from iterations.

The estimate is one number for each element of a state, the secant through its last two
values, within the bounds of an exact denoiser. It needs no evaluation. A state that is
new to the window has no secant yet; it takes the derivative for Gaussian data, with the
variance that the states before it show.
"""

from typing import NamedTuple

import jax.numpy as jnp

from sdiff_jax.samplers._ring_buffer import gather_slot, wide
from sdiff_jax.samplers.tableau import StepCoefficients
from sdiff_jax.types import Array

MARGIN = 1e-3  # distance of alpha dd/dx from 1, where the variance would be infinite
MAX_RATIO = 100.0  # the largest variance ratio
ULPS = 100  # changes of fewer units in the last place are rounding errors


class Secants(NamedTuple):
  """What a window remembers for its next estimate.

  Attributes:
    x: states of the last iteration, [B, W, ...].
    denoised: the denoised values at these, [B, W, ...].
    num_seen: number of states, from the first of the window, that were in the window of
      the last iteration too, int32 [B].
    variance_ratio: variance of the data around this sample over the variance of all
      data, as the last iteration showed it, [B, 1, ...].
  """

  x: Array
  denoised: Array
  num_seen: Array
  variance_ratio: Array


def estimate_slopes(
  last: Secants, x: Array, denoised: Array, offset: Array, step: StepCoefficients
) -> tuple[Array, Array]:
  """Returns dd/dx = (d - d_last) / (x - x_last), clipped to [0, 1 / alpha].

  New states have the derivative for Gaussian data whose variance is `variance_ratio`
  times that of all data,

      alpha dd/dx = o / (1 + o),  o = variance_ratio alpha gain / (1 - alpha gain).

  Args:
    last: of the last iteration.
    x: states, [B, W, ...].
    denoised: the denoised values at these, [B, W, ...].
    offset: position of each slot's state in its window, int32 [B, W].
    step: coefficients of the steps, [B, W, 1, ...].

  Returns:
    dd/dx by element, [B, W, ...], and the variance ratio that the last state with a
    secant shows, [B, 1, ...]; its dd/dx is taken as one number, <dx, dd> / <dx, dx>.
  """
  alpha, num_seen = step.alpha, last.num_seen[:, None]
  dx, dd = x - last.x, denoised - last.denoised
  fraction = alpha * step.gain
  odds = fraction / jnp.maximum(1 - fraction, MARGIN)
  guess = last.variance_ratio[:, None] * odds
  guess = guess / ((1 + guess) * alpha)
  # Where a change is hardly more than rounding, the guess has the same weight.
  rounding = ULPS * jnp.finfo(denoised.dtype).eps * (jnp.abs(x) + jnp.abs(denoised))
  has_secant = wide(offset < num_seen, denoised.ndim) & (dx != 0)
  total = jnp.where(has_secant, dx**2 + rounding**2, 1)
  slope = jnp.where(has_secant, (dx * dd + rounding**2 * guess) / total, guess)
  is_last, axes = offset == num_seen - 1, tuple(range(1, dx.ndim - 1))
  dot, square = (
    jnp.sum(gather_slot(dx * v, is_last), axes, keepdims=True) for v in (dd, dx)
  )
  fraction = gather_slot(alpha, is_last) * dot / jnp.where(square > 0, square, 1)
  fraction = jnp.clip(fraction, 0, 1 - MARGIN)
  ratio = fraction / (1 - fraction) / jnp.maximum(gather_slot(odds, is_last), MARGIN)
  ratio = jnp.where(square > 0, jnp.minimum(ratio, MAX_RATIO), last.variance_ratio)
  return jnp.clip(slope, 0, 1 / alpha), ratio
