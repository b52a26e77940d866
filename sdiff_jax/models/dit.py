"""Diffusion transformer with adaptive double normalization."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion.trigflow import END_TIME
from sdiff_jax.fields import Choices, Depth, DType, Index, Rate, Size
from sdiff_jax.kernels.attention import IMPLS, attention
from sdiff_jax.models.layers import common, conditioning, linen, patches
from sdiff_jax.models.layers.conditioning import Conditions
from sdiff_jax.types import Array, Cond, CondSpecs, Network


def positions(rows: int, columns: int, width: int) -> np.ndarray:
  """Returns fixed 2-D sine-cosine position embeddings, float32 [rows * columns, width].

  Args:
    rows: number of patches of an image from top to bottom.
    columns: number of patches from left to right.
    width: width of an embedding, a multiple of 4.

  Example:
    >>> positions(2, 3, 8).shape
    (6, 8)
  """
  frequencies = 10_000.0 ** -np.linspace(0, 1, width // 4, endpoint=False)
  parts = []
  for index in np.mgrid[:rows, :columns].reshape(2, -1, 1):
    parts += [np.sin(index * frequencies), np.cos(index * frequencies)]
  return np.concatenate(parts, axis=-1).astype(np.float32)


class Attention(nn.Module):
  """Self-attention with RMS-normalized queries and keys, [B, L, C] -> [B, L, C]."""

  heads: int
  dtype: jnp.dtype
  impl: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    size = x.shape[-1] // self.heads
    q, k, v = (
      common.DenseGeneral((self.heads, size), dtype=self.dtype, name=name)(x)
      for name in ("query", "key", "value")
    )
    q, k = common.rms_norm(q), common.rms_norm(k)
    y = attention(q, k, v, impl=self.impl)
    return _residual_out(x.shape[-1], self.dtype)(y.reshape(x.shape))


def _residual_out(width: int, dtype: jnp.dtype) -> nn.Dense:
  # A kernel of zeros makes each block start as the identity.
  return common.Dense(width, dtype=dtype, kernel_init=nn.initializers.zeros, name="out")


class MLP(nn.Module):
  """MLP with one hidden layer of 4 C features, [B, L, C] -> [B, L, C]."""

  dropout: float
  deterministic: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = nn.gelu(common.Dense(4 * x.shape[-1], dtype=self.dtype, name="in")(x))
    h = nn.Dropout(self.dropout, deterministic=self.deterministic)(h)
    return _residual_out(x.shape[-1], self.dtype)(h)


class Block(nn.Module):
  """Residual attention and MLP, each behind an adaptive double norm, [B, L, C]."""

  heads: int
  dropout: float
  deterministic: bool
  dtype: jnp.dtype
  impl: str

  @nn.compact
  def __call__(self, h: Array, emb: Array) -> tuple[Array, None]:
    y = common.AdaptiveDoubleNorm(self.dtype, name="attention_norm")(h, emb)
    h += Attention(self.heads, self.dtype, self.impl, name="attention")(y)
    y = common.AdaptiveDoubleNorm(self.dtype, name="mlp_norm")(h, emb)
    h += MLP(self.dropout, self.deterministic, self.dtype, name="mlp")(y)
    return h, None


class Dit(nn.Module):
  """F(x, t, cond) of images x [B, H, W, C] at times t [B] -> [B, H, W, C].

  The last `decoder_blocks` blocks and the last layer see the end time instead of t.
  """

  patch: int
  width: int
  depth: int
  decoder_blocks: int
  heads: int
  conditions: Conditions
  dropout: float
  block: type[nn.Module]
  unroll: int
  dtype: jnp.dtype
  attention: str

  @nn.compact
  def __call__(self, x: Array, t: Array, cond: Cond, *, deterministic: bool) -> Array:
    B, H, W, C = x.shape
    p, rows, columns = self.patch, H // self.patch, W // self.patch
    embedded = tuple(
      (name, spec)
      for name, spec in self.conditions
      if not (self.decoder_blocks and name == END_TIME)
    )
    embed = conditioning.Embedding(self.width, embedded, self.dtype)
    emb = last = embed(t, cond)
    if self.decoder_blocks:
      last = embed(conditioning.value_of(cond, END_TIME), cond)
      encoder_blocks = self.depth - self.decoder_blocks
      emb = jnp.stack([emb] * encoder_blocks + [last] * self.decoder_blocks)
    h = patches.split(x, p).reshape(B, rows * columns, p * p * C).astype(self.dtype)
    h = common.Dense(self.width, dtype=self.dtype, name="in")(h)
    h += positions(rows, columns, self.width).astype(self.dtype)[None]
    blocks = nn.scan(
      self.block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=0 if self.decoder_blocks else nn.broadcast,  # of emb
      length=self.depth,
      unroll=self.unroll,
    )(
      self.heads,
      self.dropout,
      deterministic,
      self.dtype,
      self.attention,
      name="blocks",
    )
    h, _ = blocks(h, emb)
    h = common.AdaptiveDoubleNorm(self.dtype, name="out_norm")(h, last)
    h = _residual_out(p * p * C, self.dtype)(h)
    return patches.join(h.reshape(B, rows, columns, p * p * C), p)


@registry.register(
  "models",
  "dit",
  sample_ndim=3,
  minimal={"shape": (4, 6, 2), "width": 16, "depth": 2, "heads": 2},
  tiny={"patch": 1, "width": 32, "depth": 2, "heads": 2},
  unrolled=lambda fields: {"unroll": fields["depth"]},
  without_kernels=lambda fields: {"attention": "plain"},
  without_remat=lambda fields: {"remat": ""},
)
def build(
  *,
  shape: tuple[int, ...],
  cond: CondSpecs,
  patch: Size = 2,
  width: Size = 384,
  depth: Depth = 12,
  heads: Size = 6,
  dropout: Rate = 0.0,
  guidance: bool = False,
  decoder_blocks: Index = 0,
  remat: common.Remat = "",
  unroll: Depth = 1,
  dtype: DType = "float32",
  attention: Annotated[str, Choices(IMPLS)] = "auto",
) -> Network:
  """Returns the transformer as a Network (arXiv:2212.09748 with adaptive double norm).

  Args:
    shape: (H, W, C) of one sample.
    cond: conditions of one sample by name, as the data set declares them.
    patch: side of a patch, pixels; must divide H and W.
    width: number of features of a token, a multiple of 4 and of heads.
    depth: number of blocks.
    heads: number of attention heads.
    dropout: dropout rate inside the MLPs.
    guidance: whether the scale of classifier-free guidance is an input.
    decoder_blocks: number of the last blocks that see the end time of a flow map instead
      of the time (Decoupled MeanFlow, arXiv:2510.24474). The parameters are then those of
      the network without an end time, which the flow map equals at s = t. 0 embeds the
      end time beside the time in all blocks.
    remat: what a block recomputes in the backward pass: "" nothing, "weights" what it
      gathers from other devices, "dots" everything
      but matrix products and convolutions, "full" everything.
    unroll: number of blocks in one iteration of the loop over them; more compile slower
      and run faster.
    dtype: dtype of the hidden layers; parameters are float32.
    attention: implementation (see `kernels.attention`): "plain" stores all scores,
      "fused" computes them in blocks, "auto" is "plain" for images of few patches.

  Raises:
    ValueError: sizes that do not divide, or an unknown option.

  Example:
    >>> import jax
    >>> network = build(shape=(4, 4, 1), cond={}, patch=2, width=8, depth=1, heads=1)
    >>> params = jax.eval_shape(network.init, jax.random.key(0))
    >>> x, t = jnp.ones((2, 4, 4, 1)), jnp.ones(2)
    >>> jax.eval_shape(network.apply, params, x, t, None).shape
    (2, 4, 4, 1)
  """
  if len(shape) != 3 or shape[0] % patch or shape[1] % patch:
    raise ValueError(f"patch={patch}: must divide height and width of {shape}")
  if width % heads or width % 4:
    raise ValueError(f"width={width}: must be a multiple of 4 and of heads={heads}")
  if decoder_blocks > depth:
    raise ValueError(f"decoder_blocks={decoder_blocks}: must be at most depth={depth}")
  if decoder_blocks and END_TIME not in cond:
    raise ValueError(
      f"decoder_blocks={decoder_blocks}: needs the condition {END_TIME!r} of a loss of "
      "flow maps"
    )
  conditions = conditioning.conditions(cond, guidance=guidance)
  module = Dit(
    patch,
    width,
    depth,
    decoder_blocks,
    heads,
    conditions,
    dropout,
    common.remat(Block, remat, in_loop=True),
    unroll,
    jnp.dtype(dtype),
    attention,
  )
  return linen.as_network(module, shape=shape, conditions=conditions)
