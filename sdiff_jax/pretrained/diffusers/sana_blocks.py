"""Blocks that SANA's transformer and its autoencoder share (arXiv:2410.10629)."""

import functools

import flax.linen as nn
import jax.numpy as jnp

from sdiff_jax.models.layers import common
from sdiff_jax.types import Array

LINEAR_EPS = 1e-15  # in the denominator of linear attention


def linear_attention(q: Array, k: Array, v: Array) -> Array:
  """Returns relu(q) (relu(k)^T v) / (relu(q) sum relu(k)), [B, L, heads, size].

  Its cost is linear in the number of tokens; sums are in float32 or wider.

  Args:
    q: queries, [B, L, heads, size].
    k: keys, the same shape.
    v: values, the same shape.

  Source: arXiv:2006.16236; arXiv:2410.10629, section 2.2.

  Example:
    >>> q = k = jnp.ones((1, 2, 1, 3))
    >>> v = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1).repeat(3, 3)
    >>> linear_attention(q, k, v)[0, 0, 0].tolist()
    [2.0, 2.0, 2.0]
  """
  q, k, w = (common.to_accumulation_dtype(a) for a in (nn.relu(q), nn.relu(k), v))
  whole = jnp.einsum("blhd,bhde->blhe", q, jnp.einsum("bmhd,bmhe->bhde", k, w))
  total = jnp.einsum("blhd,bhd->blh", q, k.sum(axis=1))
  return (whole / (total[..., None] + LINEAR_EPS)).astype(v.dtype)


class GatedConv(nn.Module):
  """linear(a silu(b)) with a, b = split(conv(silu(linear(x)))), [B, H, W, C] -> the same.

  The convolution is of 3 x 3 pixels of each channel alone.
  """

  ratio: float  # of hidden units to C
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    both = 2 * int(self.ratio * x.shape[-1])
    dense = functools.partial(common.Dense, dtype=self.dtype)
    h = nn.silu(dense(both, name="conv_inverted")(x))
    options = {"feature_group_count": both, "padding": 1, "dtype": self.dtype}
    h = common.Conv(both, (3, 3), name="conv_depth", **options)(h)
    h, gate = jnp.split(h, 2, axis=-1)
    return dense(x.shape[-1], use_bias=False, name="conv_point")(h * nn.silu(gate))
