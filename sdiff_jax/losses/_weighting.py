"""Adaptive weighting of a squared error over t."""

import jax.numpy as jnp

from sdiff_jax.types import Array


def adaptive(error: Array, w: Array | None) -> tuple[Array, Array]:
  """Returns the weighted loss and the mean squared error of each sample.

  loss = e^w mse - w with mse = |error|^2 / D. The minimum over w is at
  e^w = 1 / E[mse], where every t has the same weight (arXiv:2410.11081, eq. 8).

  Args:
    error: residual, [B, ...].
    w: w_phi(t), [B], or None for no weight.

  Returns:
    loss [B] and mse [B], float32.
  """
  axes = tuple(range(1, error.ndim))
  mse = jnp.mean(jnp.square(error.astype(jnp.float32)), axes)
  if w is None:
    return mse, mse
  return jnp.exp(w) * mse - w, mse
