"""Magnitude-preserving layers: unit variance in, unit variance out (EDM2).

Karras et al., arXiv:2312.02696, appendix B. A weight is stored as it was trained and
normalized where it is used, so that its gradient is orthogonal to it;
`normalize_weights` restores the norm of stored weights after an update ("forced" weight
normalization).
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdiff_jax.distributed import sharding
from sdiff_jax.models.layers import common
from sdiff_jax.types import Array, Params

EPS = 1e-4
# Added under the square root, whose derivative at a vector of zeros is NaN without it;
# without effect on vectors that are longer than EPS.
TINY = 1e-14


def normalize(x: Array, axes: tuple[int, ...]) -> Array:
  """Returns x / (rms(x) + eps) over the axes; statistics are in float32 or wider.

  Args:
    x: any array.
    axes: axes that the root mean square is taken over.
  """
  w = common.to_accumulation_dtype(x)
  rms = jnp.sqrt(jnp.mean(jnp.square(w), axes, keepdims=True) + TINY)
  return (w / (rms + EPS)).astype(x.dtype)


def pixel_norm(x: Array) -> Array:
  """Returns x normalized over its channels, the last axis."""
  return normalize(x, (-1,))


def silu(x: Array) -> Array:
  """Returns silu(x) / 0.596, of unit variance for a standard normal x (eq. 81)."""
  return jax.nn.silu(x) / 0.596


def add(a: Array, b: Array, t: float) -> Array:
  """Returns ((1-t) a + t b) / sqrt((1-t)^2 + t^2) (eq. 88)."""
  return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def concatenate(a: Array, b: Array, t: float) -> Array:
  """Returns a and b concatenated on the last axis with weights 1 - t and t (eq. 103).

  Each is scaled so that its contribution to a later sum does not depend on its number of
  channels.
  """
  sizes = a.shape[-1], b.shape[-1]
  scale = math.sqrt(sum(sizes)) / math.hypot(1 - t, t)
  parts = (a * (scale * (1 - t) / sizes[0] ** 0.5), b * (scale * t / sizes[1] ** 0.5))
  return jnp.concatenate(parts, axis=-1)


def normalize_weight(w: Array) -> Array:
  """Returns w [..., out] whose rms over all inputs of each output is 1 (eq. 47)."""
  return normalize(w, tuple(range(w.ndim - 1)))


def normalize_weights(params: Params) -> Params:
  """Returns the parameters with all leaves named `weight` normalized."""

  def normalized(path: tuple, leaf: Array) -> Array:
    return normalize_weight(leaf) if path[-1].key == "weight" else leaf

  return jax.tree.map_with_path(normalized, params)


def _weight(module: nn.Module, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
  """Returns the weight of a module, with columns of length 1."""

  def init(key: Array, shape: tuple[int, ...]) -> Array:
    return normalize_weight(jax.random.normal(key, shape, jnp.float32))

  stored = module.param("weight", init, shape)
  return (normalize_weight(stored) / math.prod(shape[:-1]) ** 0.5).astype(dtype)


class Linear(nn.Module):
  """x W without bias, [..., C] -> [..., features]."""

  features: int
  dtype: jnp.dtype | None = None  # None: that of x

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dtype = self.dtype or x.dtype
    w = _weight(self, (x.shape[-1], self.features), dtype)
    return sharding.rowwise(jnp.matmul, x.astype(dtype), w)


class Conv(nn.Module):
  """3 x 3 convolution without bias, [B, H, W, C] -> [B, H, W, features]."""

  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    w = _weight(self, (3, 3, x.shape[-1], self.features), self.dtype)
    conv = functools.partial(
      jax.lax.conv_general_dilated,
      window_strides=(1, 1),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return sharding.rowwise(conv, x.astype(self.dtype), w)


class Fourier(nn.Module):
  """sqrt(2) cos(t f + p) with fixed random f and p, [B] -> [B, features].

  Frequencies f and phases p are parameters, since a trained network needs those that it
  was trained with, but they have no gradient.
  """

  features: int

  @nn.compact
  def __call__(self, t: Array) -> Array:
    shape, tau = (self.features,), 2 * math.pi
    f = self.param("freqs", lambda k: tau * jax.random.normal(k, shape, jnp.float32))
    p = self.param("phases", lambda k: tau * jax.random.uniform(k, shape, jnp.float32))
    f, p = jax.lax.stop_gradient((f, p))
    return jnp.cos(t[:, None] * f[None] + p[None]) * 2**0.5
