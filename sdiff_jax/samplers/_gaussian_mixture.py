"""A denoiser that is known: of a mixture of Gaussians.

How many passes a parallel sampler takes hangs on the solver and the tolerance more
than on the network, so this stands in for one that costs something.
"""

import functools

import jax.numpy as jnp
import numpy as np

from sdiff_jax.samplers._ring_buffer import wide
from sdiff_jax.types import Array, Cond, Denoiser

STDS, SHARES = (0.2, 0.4, 0.6, 0.3, 0.5), (0.3, 0.2, 0.2, 0.2, 0.1)  # of sigma_d
SPREAD = 1.2  # of the components' means, in sigma_d


def denoiser(sigma_d: float, dimensions: int = 16) -> Denoiser:
  """Returns E[x0 | x] on the TrigFlow path, x [B, dimensions] and time [B].

  Args:
    sigma_d: scale of the data.
    dimensions: D.
  """
  rng = np.random.default_rng(0)
  means = SPREAD * sigma_d * rng.standard_normal((len(STDS), dimensions))

  def of(x: Array, time: Array, cond: Cond) -> Array:
    # Sums of elementwise terms: a row comes out alike in any batch.
    cos, sin = wide(jnp.cos(time), x.ndim), sigma_d * wide(jnp.sin(time), x.ndim)
    logs, parts = [], []
    for mean, std, share in zip(means, STDS, SHARES, strict=True):
      mean, std = jnp.asarray(mean, x.dtype)[None], std * sigma_d
      var, off = (cos * std) ** 2 + sin**2, x - cos * mean
      log = -0.5 * jnp.sum(off**2 / var + jnp.log(var), -1, keepdims=True)
      logs.append(log + float(np.log(share)))
      parts.append(mean + cos * std**2 / var * off)
    most = functools.reduce(jnp.maximum, logs)
    weights = [jnp.exp(log - most) for log in logs]
    total = functools.reduce(jnp.add, weights)
    return sum(w * part for w, part in zip(weights, parts, strict=True)) / total

  return of
