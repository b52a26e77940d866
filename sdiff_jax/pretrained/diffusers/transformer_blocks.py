"""Blocks of the transformers of Stable Diffusion 3 and Flux, on tokens [B, L, C].

Parameters are named as in the diffusers format. A block is steered by an embedding of
time and text, from which a linear layer makes scales, shifts and gates (arXiv:2212.09748).
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.kernels.attention import attention
from sdiff_jax.models.layers import common
from sdiff_jax.models.layers.normalization import RMSNorm
from sdiff_jax.pretrained.diffusers.unet import Time
from sdiff_jax.pretrained.files.config_fields import Field
from sdiff_jax.types import Array, Cond, Json

TIME_FEATURES = 256
GUIDANCE_UNIT = 1000  # the embedding of a guidance scale is that of 1000 scale
# Of students, without effect at first; diffusers has none of them.
FURTHER_INPUTS = {"guidance_proj": Field(False, bool), "end_time": Field(False, bool)}
# A timestep, a guidance scale and the timestep at which a flow map ends, [B] each.
Times = tuple[Array, Array | None, Array | None]
Rotation = tuple[Array, Array]  # cosines and sines, [L, size / 2] each


def modulation(emb: Array, count: int, dtype: jnp.dtype, name: str) -> list[Array]:
  """Returns `count` vectors [B, 1, C] of linear(silu(emb)), inside a module.

  Args:
    emb: embedding, [B, C].
    count: number of vectors.
    dtype: of the layer.
    name: of the layer's parent.
  """
  dense = common.Dense(count * emb.shape[-1], dtype=dtype, name=f"{name}.linear")
  return jnp.split(dense(nn.silu(emb))[:, None], count, axis=-1)


def modulated(x: Array, shift: Array, scale: Array, eps: float = common.EPS) -> Array:
  """Returns layer_norm(x) (1 + scale) + shift.

  Args:
    x: tokens, [B, L, C].
    shift: [B, 1, C].
    scale: [B, 1, C].
    eps: of the norm.

  Example:
    >>> zero = jnp.zeros((1, 1, 2))
    >>> abs(modulated(jnp.array([[[1.0, 3.0]]]), zero, zero)).round(3).tolist()
    [[[1.0, 1.0]]]
  """
  return common.layer_norm(x, eps) * (1 + scale) + shift


def rotate(x: Array, rotation: Rotation) -> Array:
  """Returns x with pairs of neighboring channels rotated (arXiv:2104.09864).

  Args:
    x: queries or keys, [B, L, heads, size].
    rotation: cosines and sines, [L, size / 2] each.

  Example:
    >>> quarter = jnp.zeros((1, 1)), jnp.ones((1, 1))
    >>> rotate(jnp.array([[[[1.0, 2.0]]]]), quarter).tolist()
    [[[[-2.0, 1.0]]]]
  """
  w = common.to_accumulation_dtype(x)
  cos, sin = (a.astype(w.dtype)[None, :, None] for a in rotation)
  a, b = w[..., ::2], w[..., 1::2]
  turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)


def times(c: Mapping[str, Json], time: Array, cond: Cond) -> Times:
  """Returns what a network embeds with the time, by the fields FURTHER_INPUTS of `c`."""
  cond = cond or {}
  guidance = cond["distilled_guidance"] if c.get("guidance_proj") else None
  return time, guidance, cond["end_time"] if c["end_time"] else None


def no_times(c: Mapping[str, Json]) -> Times:
  """Returns `times` of zeros, one each, by which parameters are initialized."""
  zero = jnp.zeros((1,), jnp.float32)
  return times(c, zero, {"distilled_guidance": zero, "end_time": zero})


class Embedding(nn.Module):
  """Embeds `times` of [B], pooled text [B, P] and, if given, a guidance scale [B].

  Returns [B, width]. The scale is that of Flux, which has an embedder of its own for it.
  """

  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, times: Times, pooled: Array, guidance: Array | None) -> Array:
    waves = functools.partial(Time, TIME_FEATURES, self.width, 0.0, True, self.dtype)
    emb = waves(name="timestep_embedder")(*times)
    if guidance is not None:
      emb += waves(name="guidance_embedder")(GUIDANCE_UNIT * guidance)
    dense = functools.partial(common.Dense, self.width, dtype=self.dtype)
    h = nn.silu(dense(name="text_embedder.linear_1")(pooled.astype(self.dtype)))
    return emb + dense(name="text_embedder.linear_2")(h)


class Heads(nn.Module):
  """Queries, keys and values of tokens, [B, L, heads, size] each."""

  heads: int
  names: tuple[str, ...]  # of the three layers, and of the norms of queries and keys
  norm: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> list[Array]:
    B, L, C = x.shape
    dense = functools.partial(common.Dense, C, dtype=self.dtype)
    parts = [dense(name=n)(x).reshape(B, L, self.heads, -1) for n in self.names[:3]]
    for i, name in enumerate(self.names[3:] if self.norm else ()):
      parts[i] = RMSNorm(self.dtype, name=name)(parts[i])
    return parts


OWN = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
OTHER = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


class TokenAttention(nn.Module):
  """Attention of image tokens [B, L, C] to themselves and to those of a text [B, M, C].

  Returns both; None for a text that is not there, or not needed any more (`last`).
  Only image tokens are rotated.
  """

  heads: int
  norm: bool
  dtype: jnp.dtype
  last: bool = False
  project: bool = True

  @nn.compact
  def __call__(
    self, x: Array, text: Array | None = None, rotation: Rotation | None = None
  ) -> tuple[Array, Array | None]:
    own = Heads(self.heads, OWN, self.norm, self.dtype)
    nn.share_scope(self, own)
    q, k, v = own(x)
    if rotation is not None:
      q, k = rotate(q, rotation), rotate(k, rotation)
    if text is not None:
      other = Heads(self.heads, OTHER, self.norm, self.dtype)
      nn.share_scope(self, other)
      parts = zip((q, k, v), other(text), strict=True)
      q, k, v = (jnp.concatenate(pair, axis=1) for pair in parts)
    h = attention(q, k, v).reshape(x.shape[0], -1, x.shape[-1])
    h, rest = h[:, : x.shape[1]], h[:, x.shape[1] :]
    dense = functools.partial(common.Dense, x.shape[-1], dtype=self.dtype)
    if self.project:
      h = dense(name="to_out.0")(h)
    if text is None or self.last:
      return h, None
    return h, dense(name="to_add_out")(rest)


class FeedForward(nn.Module):
  """linear(gelu(linear(x))) with four times as many hidden units."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dense = functools.partial(common.Dense, dtype=self.dtype)
    h = nn.gelu(dense(4 * x.shape[-1], name="net.0.proj")(x), approximate=True)
    return dense(x.shape[-1], name="net.2")(h)


class JointBlock(nn.Module):
  """A block of image and text tokens with weights of their own and joint attention.

  It is that of arXiv:2403.03206, figure 2; `dual` adds a second attention of the image
  alone, and the last block returns no text.
  """

  heads: int
  norm: bool
  last: bool
  dual: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Array, text: Array, emb: Array, rotation: Rotation | None = None
  ) -> tuple[Array, Array | None]:
    steer = functools.partial(modulation, emb, dtype=self.dtype)
    shift, scale, gate, *mlp = steer(9 if self.dual else 6, name="norm1")
    if self.last:
      c_scale, c_shift = steer(2, name="norm1_context")
    else:
      c_shift, c_scale, c_gate, *c_mlp = steer(6, name="norm1_context")
    attend = functools.partial(TokenAttention, self.heads, self.norm, self.dtype)
    h, rest = attend(self.last, name="attn")(
      modulated(x, shift, scale), modulated(text, c_shift, c_scale), rotation
    )
    before = x
    x += gate * h
    if self.dual:
      shift, scale, gate = mlp[3:]
      x += gate * attend(name="attn2")(modulated(before, shift, scale))[0]
    shift, scale, gate = mlp[:3]
    x += gate * FeedForward(self.dtype, name="ff")(modulated(x, shift, scale))
    if rest is None:
      return x, None
    text += c_gate * rest
    shift, scale, gate = c_mlp
    h = FeedForward(self.dtype, name="ff_context")(modulated(text, shift, scale))
    return x, text + gate * h


class SingleBlock(nn.Module):
  """x + gate linear([attention(h), gelu(linear(h))]) with h the modulated x."""

  heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, emb: Array, rotation: Rotation) -> Array:
    shift, scale, gate = modulation(emb, 3, self.dtype, "norm")
    h = modulated(x, shift, scale)
    dense = functools.partial(common.Dense, dtype=self.dtype)
    hidden = nn.gelu(dense(4 * x.shape[-1], name="proj_mlp")(h), approximate=True)
    attend = TokenAttention(
      self.heads, norm=True, dtype=self.dtype, project=False, name="attn"
    )
    both = jnp.concatenate([attend(h, None, rotation)[0], hidden], axis=-1)
    return x + gate * dense(x.shape[-1], name="proj_out")(both)


class Output(nn.Module):
  """linear(modulated(x)) from tokens to what the network predicts, [B, L, out]."""

  out: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, emb: Array) -> Array:
    scale, shift = modulation(emb, 2, self.dtype, "norm_out")
    h = modulated(x, shift, scale)
    return common.Dense(self.out, dtype=self.dtype, name="proj_out")(h)


def sincos(width: int, rows: int, columns: int, base: float) -> np.ndarray:
  """Returns the fixed positions of a grid of tokens, float64 [rows * columns, width].

  Half of the channels are sines and cosines of the column, half of the row, in units of
  columns / base and rows / base.

  Args:
    width: number of channels, a multiple of 4.
    rows: number of rows of the grid.
    columns: number of its columns.
    base: number of rows and columns that the units belong to.

  Example:
    >>> sincos(4, 2, 2, 2)[1].round(2).tolist()
    [0.84, 0.54, 0.0, 1.0]
  """

  def waves(count: int) -> np.ndarray:
    at = np.arange(count) / (count / base)
    angles = at[:, None] * 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

  shape = (rows, columns, width // 2)
  parts = waves(columns)[None], waves(rows)[:, None]
  both = np.concatenate([np.broadcast_to(part, shape) for part in parts], axis=-1)
  return both.reshape(rows * columns, width)


def patches(x: Array, size: int) -> Array:
  """Returns patches of size x size as tokens of channels (C, row, column), [B, L, C s^2].

  Args:
    x: latents, [B, H, W, C].
    size: s.
  """
  B, H, W, C = x.shape
  x = x.reshape(B, H // size, size, W // size, size, C)
  return x.transpose(0, 1, 3, 5, 2, 4).reshape(B, -1, C * size**2)


def from_patches(x: Array, size: int, rows: int, *, channels_last: bool) -> Array:
  """Returns latents [B, H, W, C] of tokens [B, L, C s^2].

  Args:
    x: tokens.
    size: s.
    rows: H / s.
    channels_last: whether the channels of a token are (row, column, C), and not
      (C, row, column).
  """
  B, L, width = x.shape
  columns, C = L // rows, width // size**2
  order = (size, size, C) if channels_last else (C, size, size)
  axes = (0, 1, 3, 2, 4, 5) if channels_last else (0, 1, 4, 2, 5, 3)
  x = x.reshape(B, rows, columns, *order).transpose(axes)
  return x.reshape(B, rows * size, columns * size, C)


def check_sides(x: jax.Array, size: int) -> None:
  """Raises a ValueError unless patches of a size cover latents [B, H, W, C]."""
  if x.shape[1] % size or x.shape[2] % size:
    raise ValueError(f"x: {size} must divide height and width, got {x.shape}")
