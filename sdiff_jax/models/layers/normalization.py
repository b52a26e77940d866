"""GroupNorm, LayerNorm and RMSNorm with a learned scale, and a bias.

Statistics are computed in float32 or wider whatever the type of the layer, with the
variance as the mean of squared differences, as PyTorch does. `flax.linen`'s norms
compute E[x^2] - E[x]^2 by default, which does not reproduce PyTorch's results.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdiff_jax.models.layers import common
from sdiff_jax.types import Array


class GroupNorm(nn.Module):
  """Norm over the pixels and the channels of each group, then scale and bias."""

  groups: int
  epsilon: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    w = common.to_accumulation_dtype(x).reshape(
      x.shape[0], -1, self.groups, x.shape[-1] // self.groups
    )
    w = _norm(w, (1, 3), self.epsilon).reshape(x.shape)
    return _affine(self, w)


class LayerNorm(nn.Module):
  """Norm over the last axis, then scale and bias."""

  epsilon: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return _affine(self, _norm(common.to_accumulation_dtype(x), (-1,), self.epsilon))


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + epsilon) over the last axis, then scale, and bias if asked."""

  dtype: jnp.dtype
  epsilon: float = 1e-6
  bias: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    w = common.to_accumulation_dtype(x)
    w *= jax.lax.rsqrt(jnp.mean(jnp.square(w), -1, keepdims=True) + self.epsilon)
    if self.bias:
      return _affine(self, w)
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:]).astype(w.dtype)
    return (w * scale.reshape(*(1,) * (x.ndim - 1), -1)).astype(self.dtype)


def _norm(w: Array, axes: tuple[int, ...], eps: float) -> Array:
  w -= jnp.mean(w, axes, keepdims=True)
  return w * jax.lax.rsqrt(jnp.mean(jnp.square(w), axes, keepdims=True) + eps)


def _affine(module: nn.Module, w: Array) -> Array:
  """Returns w scale + bias, by parameters of the module, in its type."""
  shape, ones = w.shape[-1:], (1,) * (w.ndim - 1)
  scale = module.param("scale", nn.initializers.ones, shape).astype(w.dtype)
  bias = module.param("bias", nn.initializers.zeros, shape).astype(w.dtype)
  return (w * scale.reshape(*ones, -1) + bias.reshape(*ones, -1)).astype(module.dtype)
