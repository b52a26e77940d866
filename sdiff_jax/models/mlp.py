"""A residual MLP for small data, by default with the stabilized layers of sCM."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.fields import Depth, DType, Positive, Range, Rate, Size
from sdiff_jax.models.layers import common, conditioning, linen
from sdiff_jax.models.layers.conditioning import Conditions
from sdiff_jax.types import Array, Cond, CondSpecs, Network

NORMS = {"double": common.AdaptiveDoubleNorm, "single": common.AdaptiveNorm}


class Block(nn.Module):
  """h + W2 dropout(silu(W1 silu(norm(h, emb)))), [B, width] -> [B, width]."""

  norm: type[nn.Module]
  dropout: float
  deterministic: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, h: Array, emb: Array) -> tuple[Array, None]:
    width = h.shape[-1]
    y = self.norm(self.dtype)(h, emb)
    y = common.Dense(width, dtype=self.dtype)(nn.silu(y))
    y = nn.Dropout(self.dropout, deterministic=self.deterministic)(nn.silu(y))
    return h + common.Dense(width, dtype=self.dtype)(y), None


class Mlp(nn.Module):
  """F(x, t, cond) of flattened samples x [B, ...] at times t [B] -> [B, ...]."""

  width: int
  depth: int
  embed: int
  embedding: str
  norm: type[nn.Module]
  conditions: Conditions
  dropout: float
  unroll: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, t: Array, cond: Cond, *, deterministic: bool) -> Array:
    flat = x.reshape(x.shape[0], -1).astype(self.dtype)
    embed = conditioning.Embedding(
      self.embed, self.conditions, self.dtype, self.embedding
    )
    emb = embed(t, cond)
    h = common.Dense(self.width, dtype=self.dtype, name="in")(flat)
    blocks = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=nn.broadcast,
      length=self.depth,
      unroll=self.unroll,
    )
    options = self.norm, self.dropout, deterministic, self.dtype
    h, _ = blocks(*options, name="blocks")(h, emb)
    h = self.norm(self.dtype, name="out_norm")(h, emb)
    h = nn.silu(h)
    # The output is gain * x + shift: noise, which the hidden layers cannot represent,
    # passes from input to output without them.
    gain, shift = (
      common.Dense(
        flat.shape[-1], dtype=self.dtype, kernel_init=nn.initializers.zeros, name=name
      )(h)
      for name in ("gain", "shift")
    )
    return (gain * flat + shift).reshape(x.shape)


@registry.register(
  "models",
  "mlp",
  minimal={"shape": (2, 3), "width": 16, "depth": 2},
  unrolled=lambda fields: {"unroll": fields["depth"]},
)
def build(
  *,
  shape: tuple[int, ...],
  cond: CondSpecs,
  sigma_d: Positive | None = None,
  width: Size = 256,
  depth: Depth = 4,
  embed: Annotated[int, Range(2, 65_536)] = 64,
  process: common.Process = "trigflow",
  embedding: common.TimeEmbedding = "positional",
  norm: common.Norm = "double",
  dropout: Rate = 0.0,
  guidance: bool = False,
  unroll: Depth = 4,
  dtype: DType = "float32",
) -> Network:
  """Returns the MLP as a Network.

  Args:
    shape: shape of one sample, any rank.
    cond: conditions of one sample by name, as the data set declares them.
    sigma_d: standard deviation of the data, required by process="edm".
    width: number of features of the hidden layers.
    depth: number of residual blocks.
    embed: width of the embedding of time and conditions.
    process: "trigflow": F is the network; "edm": F = -raw(x, ln(sigma_d tan t) / 4).
    embedding: features of the time, "positional" (slow in t) or "fourier" (EDM's).
    norm: "double" (adaptive double norm) or "single" (adaptive norm, as AdaGN).
    dropout: dropout rate inside the blocks.
    guidance: whether the scale of classifier-free guidance is an input.
    unroll: number of blocks in one iteration of the loop over them; more compile slower
      and run faster.
    dtype: dtype of the hidden layers; parameters are float32.

  Raises:
    ValueError: an unknown option.

  Example:
    >>> import jax
    >>> network = build(shape=(2,), cond={}, width=8, depth=1, embed=8)
    >>> params = network.init(jax.random.key(0))
    >>> network.apply(params, jnp.ones((2, *(2,))), jnp.ones(2), None).shape
    (2, 2)
  """
  conditions = conditioning.conditions(cond, guidance=guidance)
  module = Mlp(
    width=width,
    depth=depth,
    embed=embed,
    embedding=embedding,
    norm=NORMS[norm],
    conditions=conditions,
    dropout=dropout,
    unroll=unroll,
    dtype=jnp.dtype(dtype),
  )
  net = linen.as_network(module, shape=shape, conditions=conditions)
  return linen.trigflow_from_edm(net, sigma_d) if process == "edm" else net
