"""A residual perceptron with adaptive double normalisation, for small data."""

import flax.linen as nn
import jax.numpy as jnp

from sdiff_jax.interfaces import Array, Cond, Network
from sdiff_jax.models import layers, network


class Block(nn.Module):
  """h + W2 drop(silu(W1 silu(adn(h, emb)))), [B, width] -> [B, width]."""

  dropout: float
  deterministic: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, h: Array, emb: Array) -> tuple[Array, None]:
    width = h.shape[-1]
    y = layers.AdaptiveDoubleNorm(self.dtype)(h, emb)
    y = nn.Dense(width, dtype=self.dtype)(nn.silu(y))
    y = nn.Dropout(self.dropout, deterministic=self.deterministic)(nn.silu(y))
    return h + nn.Dense(width, dtype=self.dtype)(y), None


class Mlp(nn.Module):
  """F(x, t, cond) of a flattened sample, [B, ...] -> [B, ...]."""

  width: int
  depth: int
  embed: int
  classes: int
  guidance: bool
  dropout: float
  unroll: int
  dtype: jnp.dtype
  observation: bool

  @nn.compact
  def __call__(self, x: Array, t: Array, cond: Cond, *, deterministic: bool) -> Array:
    flat = x.reshape(x.shape[0], -1).astype(self.dtype)
    embed = layers.Embedding(
      self.embed, self.classes, self.guidance, self.dtype, self.observation
    )
    emb = embed(t, cond)
    h = nn.Dense(self.width, dtype=self.dtype, name="in")(flat)
    blocks = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=nn.broadcast,
      length=self.depth,
      unroll=self.unroll,
    )
    h, _ = blocks(self.dropout, deterministic, self.dtype, name="blocks")(h, emb)
    h = layers.AdaptiveDoubleNorm(self.dtype, name="out_norm")(h, emb)
    h = nn.silu(h)
    # A filter of the input that depends on its content: what the image does not
    # decide, noise above all, passes by the hidden layers pixel by pixel.
    gain, shift = (
      nn.Dense(
        flat.shape[-1], dtype=self.dtype, kernel_init=nn.initializers.zeros, name=name
      )(h)
      for name in ("gain", "shift")
    )
    return (gain * flat + shift).reshape(x.shape)


def build(
  *,
  shape: tuple[int, ...],
  classes: int,
  observation: int | None = None,
  width: int = 256,
  depth: int = 4,
  embed: int = 64,
  dropout: float = 0.0,
  guidance: bool = False,
  unroll: int = 4,
  dtype: str = "float32",
) -> Network:
  """Returns the perceptron as a Network.

  Args:
    shape: shape of one sample, any rank.
    classes: number of labels; 0 for none.
    observation: numbers of an observation; None for none.
    width: features of the hidden layers.
    depth: residual blocks.
    embed: features of the embedding of time, label and guidance.
    dropout: rate inside the blocks.
    guidance: take a guidance scale as an input.
    unroll: blocks per turn of the loop over them; compile time against speed.
    dtype: type of the hidden layers; parameters are float32.
  """
  module = Mlp(
    width=width,
    depth=depth,
    embed=embed,
    classes=classes,
    guidance=guidance,
    dropout=dropout,
    unroll=unroll,
    dtype=jnp.dtype(dtype),
    observation=bool(observation),
  )
  return network.from_module(
    module,
    shape=shape,
    classes=classes,
    guidance=guidance,
    observation=observation,
  )
