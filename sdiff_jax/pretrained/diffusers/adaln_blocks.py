"""Blocks of the transformers of PixArt and SANA, on tokens [B, L, C].

One linear layer makes scales, shifts and gates of the time, and each block adds a table
of its own to them (adaLN-single, arXiv:2310.00426, section 2.3). The text is attended to
where its mask is True. Parameters are named as in the diffusers format.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from sdiff_jax.kernels.attention import attention
from sdiff_jax.models.layers import common
from sdiff_jax.models.layers.normalization import RMSNorm
from sdiff_jax.pretrained.diffusers import transformer_blocks as blocks
from sdiff_jax.pretrained.diffusers import unet
from sdiff_jax.pretrained.diffusers.transformer_blocks import Times
from sdiff_jax.pretrained.diffusers.unet import Time
from sdiff_jax.types import Array, PRNGKey

NORM_EPS = 1e-5  # of the norms of queries, keys and texts


class Steering(nn.Module):
  """Embeds `times`, and if given a guidance scale [B], and height and width [B, 2].

  Returns scales, shifts and gates of all blocks, [B, 6, C], and the embedding [B, C].
  `start` stands before the names of the embedders.
  """

  width: int
  start: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, times: Times, guidance: Array | None = None, sizes: Array | None = None
  ) -> tuple[Array, Array]:
    def embed(name: str, width: int, x: Array, *further: Array | None) -> Array:
      form = blocks.TIME_FEATURES, width, 0.0, True, self.dtype
      form = *form, unet.GUIDANCE_FEATURES, name == "guidance"
      rows = Time(*form, name=f"{self.start}{name}_embedder")(x.reshape(-1), *further)
      return rows.reshape(len(x), -1)

    emb = embed("timestep", self.width, *times)
    if guidance is not None:
      emb += embed("guidance", self.width, guidance)
    if sizes is not None:
      ratio = sizes[:, :1] / sizes[:, 1:]
      parts = ("resolution", sizes), ("aspect_ratio", ratio)
      rows = [embed(name, self.width // 3, x) for name, x in parts]
      emb += jnp.concatenate(rows, axis=-1)
    dense = common.Dense(6 * self.width, dtype=self.dtype, name="linear")
    return dense(nn.silu(emb)).reshape(len(emb), 6, -1), emb


class TextProjection(nn.Module):
  """linear(gelu(linear(text))), [B, M, E] -> [B, M, width]."""

  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, text: Array) -> Array:
    dense = functools.partial(common.Dense, self.width, dtype=self.dtype)
    h = dense(name="linear_1")(text.astype(self.dtype))
    return dense(name="linear_2")(nn.gelu(h, approximate=True))


def heads(
  module: nn.Module, x: Array, other: Array, count: int, norm: bool, bias: bool
) -> list[Array]:
  """Returns queries of x and keys and values of other, [B, L, heads, size] each.

  Args:
    module: inside which the layers are made, with a field `dtype`.
    x: [B, L, C].
    other: [B, M, C].
    count: number of heads.
    norm: whether queries and keys are normalized, over all heads together.
    bias: of the layers.
  """
  dense = functools.partial(
    common.Dense, x.shape[-1], use_bias=bias, dtype=module.dtype, parent=module
  )
  rows = [
    dense(name=name)(a) for name, a in (("to_q", x), ("to_k", other), ("to_v", other))
  ]
  for i, name in enumerate(("norm_q", "norm_k") if norm else ()):
    rows[i] = RMSNorm(module.dtype, NORM_EPS, name=name, parent=module)(rows[i])
  return [a.reshape(*a.shape[:2], count, -1) for a in rows]


class MaskedAttention(nn.Module):
  """Attention of tokens [B, L, C] to themselves, or to `other` [B, M, C] by its mask."""

  heads: int
  norm: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Array, other: Array | None = None, mask: Array | None = None
  ) -> Array:
    other = x if other is None else other
    h = attention(*heads(self, x, other, self.heads, self.norm, True), key_mask=mask)
    dense = common.Dense(x.shape[-1], dtype=self.dtype, name="to_out.0")
    return dense(h.reshape(x.shape))


class Block(nn.Module):
  """Self-attention, attention to the text, and what stands in place of the MLP.

  `attend` maps tokens [B, L, C], `feed` a grid of them [B, rows, columns, C].
  """

  attend: Callable[..., nn.Module]
  feed: Callable[..., nn.Module]
  heads: int  # of the attention to the text
  norm: bool
  grid: tuple[int, int]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, text: Array, mask: Array, vectors: Array) -> Array:
    parts = vectors + table(self, 6, x.shape[-1])[None]
    shift, scale, gate, *mlp = jnp.split(parts, 6, axis=1)
    x += gate * self.attend(name="attn1")(blocks.modulated(x, shift, scale))
    x += MaskedAttention(self.heads, self.norm, self.dtype, name="attn2")(x, text, mask)
    shift, scale, gate = mlp
    h = blocks.modulated(x, shift, scale).reshape(len(x), *self.grid, -1)
    return x + gate * self.feed(name="ff")(h).reshape(x.shape)


class Output(nn.Module):
  """linear(modulated(x)) from tokens to what the network predicts, [B, L, out]."""

  out: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, emb: Array) -> Array:
    parts = emb[:, None] + table(self, 2, x.shape[-1])[None]
    h = blocks.modulated(x, *jnp.split(parts, 2, axis=1))
    return common.Dense(self.out, dtype=self.dtype, name="proj_out")(h)


def table(module: nn.Module, count: int, width: int) -> Array:
  """Returns the learned vectors of a module, [count, width], in its type."""

  def init(key: PRNGKey, shape: tuple[int, ...]) -> Array:
    return nn.initializers.normal(width**-0.5)(key, shape)

  stored = module.param("scale_shift_table", init, (width, count))  # as of a matrix
  return stored.T.astype(module.dtype)


def patch_tokens(
  x: Array,
  width: int,
  size: int,
  *,
  name: str,
  dtype: jnp.dtype,
  base: float | None,
) -> Array:
  """Returns tokens [B, L, width] of patches of latents, inside a module.

  Args:
    x: latents, [B, H, W, C].
    width: of the tokens.
    size: side of a patch.
    name: of the layer.
    dtype: of the layer.
    base: number of rows that the fixed positions cover in their own units (see
      `transformer_blocks.sincos`); None for no positions.
  """
  window = (size, size)
  options = {"strides": window, "padding": "VALID", "dtype": dtype, "name": name}
  h = common.Conv(width, window, **options)(x.astype(dtype))
  rows, columns = h.shape[1:3]
  h = h.reshape(len(x), -1, width)
  if base is None:
    return h
  return h + jnp.asarray(blocks.sincos(width, rows, columns, base), dtype)[None]
