"""Blocks of the U-Nets and of the autoencoder of Stable Diffusion, on [B, H, W, C].

Parameters are named as in the diffusers format.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

from sdiff_jax.kernels.attention import attention
from sdiff_jax.models.layers import common
from sdiff_jax.models.layers.normalization import GroupNorm, LayerNorm
from sdiff_jax.pretrained.diffusers import block_loop
from sdiff_jax.types import Array

LISTS = ("transformer_blocks",)

Conv = functools.partial(common.Conv, kernel_size=(3, 3), padding=1)


class Resnet(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x))) + linear(silu(emb))))).

  [B, H, W, C] -> [B, H, W, features]; emb is [B, E], or None.
  """

  features: int
  groups: int
  eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, emb: Array | None = None) -> Array:
    norm = functools.partial(GroupNorm, self.groups, epsilon=self.eps, dtype=self.dtype)
    h = nn.silu(norm(name="norm1")(x))
    h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
    if emb is not None:
      dense = common.Dense(self.features, dtype=self.dtype, name="time_emb_proj")
      h += dense(nn.silu(emb))[:, None, None]
    h = nn.silu(norm(name="norm2")(h))
    h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
    if x.shape[-1] != self.features:
      x = common.Dense(self.features, dtype=self.dtype, name="conv_shortcut")(x)
    return x + h


class Attention(nn.Module):
  """Attention from x [B, L, C] to itself, or to `other` [B, M, E]."""

  heads: int
  bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, other: Array | None = None) -> Array:
    other, width = x if other is None else other, x.shape[-1]

    def heads(name: str, rows: Array) -> Array:
      dense = common.Dense(width, use_bias=self.bias, dtype=self.dtype, name=name)
      return dense(rows).reshape(*rows.shape[:2], self.heads, width // self.heads)

    h = attention(heads("to_q", x), heads("to_k", other), heads("to_v", other))
    return common.Dense(width, dtype=self.dtype, name="to_out.0")(h.reshape(x.shape))


class SelfAttention(nn.Module):
  """x + attention(norm(x)) over the pixels."""

  heads: int
  groups: int
  eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    norm = GroupNorm(self.groups, epsilon=self.eps, dtype=self.dtype, name="group_norm")
    B, _, _, C = x.shape
    # Names of its layers have no prefix of their own.
    attend = Attention(self.heads, bias=True, dtype=self.dtype)
    nn.share_scope(self, attend)
    return x + attend(norm(x).reshape(B, -1, C)).reshape(x.shape)


class TransformerBlock(nn.Module):
  """Self-attention, cross-attention to the text and a gated MLP; x is [B, L, C]."""

  heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, text: Array) -> Array:
    norm = functools.partial(LayerNorm, epsilon=1e-5, dtype=self.dtype)
    attend = functools.partial(Attention, self.heads, bias=False, dtype=self.dtype)
    x += attend(name="attn1")(norm(name="norm1")(x))
    x += attend(name="attn2")(norm(name="norm2")(x), text)
    h, width = norm(name="norm3")(x), x.shape[-1]
    h = common.Dense(8 * width, dtype=self.dtype, name="ff.net.0.proj")(h)
    h, gate = jnp.split(h, 2, axis=-1)
    h *= nn.gelu(gate, approximate=False)
    return x + common.Dense(width, dtype=self.dtype, name="ff.net.2")(h)


class Transformer(nn.Module):
  """x + linear(blocks(linear(norm(x)))), with attention over the pixels."""

  heads: int
  depth: int
  groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, text: Array) -> Array:
    B, _, _, C = x.shape
    h = GroupNorm(self.groups, epsilon=1e-6, dtype=self.dtype, name="norm")(x)
    h = common.Dense(C, dtype=self.dtype, name="proj_in")(h.reshape(B, -1, C))
    (h,) = block_loop.run(
      self,
      LISTS[0],
      range(self.depth),
      TransformerBlock,
      lambda i: {"heads": self.heads, "dtype": self.dtype},
      (h,),
      text,
    )
    h = common.Dense(C, dtype=self.dtype, name="proj_out")(h)
    return x + h.reshape(x.shape)


class Downsample(nn.Module):
  """Convolution of stride 2; padding 0 means zeros on the right and below only."""

  padding: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    around = (self.padding, self.padding) if self.padding else (0, 1)
    conv = functools.partial(Conv, padding=[around] * 2, strides=(2, 2))
    return conv(x.shape[-1], dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
  """Nearest-neighbor upsampling by 2, then a convolution."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = x.repeat(2, 1).repeat(2, 2)
    return Conv(x.shape[-1], dtype=self.dtype, name="conv")(x)
