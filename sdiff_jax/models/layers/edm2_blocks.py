"""Residual blocks of EDM2's U-Net and their modulation by the embedding."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdiff_jax.kernels.attention import attention
from sdiff_jax.models.layers import magnitude_preserving as mp
from sdiff_jax.models.layers import resampling
from sdiff_jax.types import Array


def halve(x: Array) -> Array:
  """Returns means over 2 x 2 pixels, [B, H, W, C] -> [B, H/2, W/2, C].

  Example:
    >>> halve(jnp.ones((1, 4, 4, 3))).shape
    (1, 2, 2, 3)
  """
  B, H, W, C = x.shape
  return jnp.mean(x.reshape(B, H // 2, 2, W // 2, 2, C), (2, 4))


def double(x: Array) -> Array:
  """Returns every pixel repeated 2 x 2 times, [B, H, W, C] -> [B, 2H, 2W, C].

  Example:
    >>> double(jnp.ones((1, 2, 2, 3))).shape
    (1, 4, 4, 3)
  """
  B, H, W, C = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C))
  return x.reshape(B, 2 * H, 2 * W, C)


def resample(x: Array, mode: str, taps: tuple[float, ...]) -> Array:
  """Returns x at half or at twice its height and width.

  Args:
    x: [B, H, W, C].
    mode: "halve" or "double".
    taps: coefficients of the filter along one axis, an even number of them; (1, 1) is the
      mean of 2 x 2 pixels, or repeats each of them.

  Example:
    >>> resample(jnp.ones((1, 4, 4, 3)), "double", (1, 1)).shape
    (1, 8, 8, 3)
  """
  if tuple(taps) == (1, 1):
    return {"halve": halve, "double": double}[mode](x)
  return resampling.resample(x, taps, up=mode == "double")


class Modulation(nn.Module):
  """norm="single": y (1 + gain s(emb)), as EDM2; "double": the adaptive double norm.

  y is [B, H, W, C], emb is [B, E]. The adaptive double norm is
  pnorm(y) pnorm(s(emb)) + pnorm(b(emb)) with linear s and b (arXiv:2410.11081, section
  4.1). The paper does not say where it is in EDM2's block; here it replaces EDM2's own
  modulation. `vectors` computes what depends on emb, for all blocks at once.
  """

  features: int
  norm: str

  def setup(self) -> None:
    self.scale = mp.Weight(self.features)
    if self.norm == "double":
      self.shift = mp.Weight(self.features)
    else:
      self.gain = self.param("gain", nn.initializers.zeros, ())

  def weights(self, inputs: int) -> list[Array]:
    """Returns the stored weights of s, and of b if there is one, [inputs, C]."""
    layers = (self.scale, self.shift) if self.norm == "double" else (self.scale,)
    return [layer(inputs) for layer in layers]

  def __call__(self, y: Array, vectors: Array) -> Array:
    s, *b = jnp.moveaxis(vectors, 1, 0)[..., None, None, :]
    if self.norm == "double":
      return mp.pixel_norm(y) * s.astype(y.dtype) + b[0].astype(y.dtype)
    return y * (1 + self.gain * s).astype(y.dtype)


def vectors(modulations: Sequence[Modulation], emb: Array) -> list[Array]:
  """Returns what each modulation computes of the embedding, [B, 1 or 2, C] each.

  These are s(emb), and b(emb) if there is one; of the double norm, already normalized.
  Those of one width share a product, since each is small.

  Args:
    modulations: those of the blocks of a network.
    emb: [B, E].
  """
  found: dict[int, Array] = {}
  for width in dict.fromkeys(m.features for m in modulations):
    group = [i for i, m in enumerate(modulations) if m.features == width]
    weights = [modulations[i].weights(emb.shape[-1]) for i in group]
    y = mp.linear(emb, jnp.stack([w for pair in weights for w in pair], 1))
    y = y.reshape(-1, len(group), len(weights[0]), width)
    if modulations[group[0]].norm == "double":
      y = mp.pixel_norm(y)
    found |= {i: y[:, at] for at, i in enumerate(group)}
  return [found[i] for i in range(len(modulations))]


class Attention(nn.Module):
  """Cosine attention: queries, keys and values of unit norm, [B, H, W, C] -> [B, H, W, C]."""

  heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    B, H, W, C = x.shape
    stored = mp.Weight(3 * C, name="qkv")(C)

    def qkv(x: Array, w: Array) -> Array:
      # Query, key and value of a channel are adjacent, the order of published weights.
      # It is the weight that is put in order, not the larger x W.
      w = jnp.moveaxis(w.reshape(C, self.heads, C // self.heads, 3), -1, 1)
      return jnp.tensordot(x, w, 1)

    w = mp.of_unit_length(stored, self.dtype)
    y = mp.product(qkv, x.astype(self.dtype), w)
    y = mp.normalize(y.reshape(B, H * W, 3, self.heads, C // self.heads), (-1,))
    q, k, v = jnp.moveaxis(y, 2, 0)
    y = attention(q, k, v).reshape(x.shape)
    return mp.Linear(C, self.dtype, name="proj")(y)


class Block(nn.Module):
  """A residual block: resampling, two convolutions, attention.

  [B, H, W, C] -> [B, H, W, features]; height and width may be halved or doubled. Blocks of
  the encoder normalize the main path; blocks of the decoder concatenate `skip` to it.
  `vectors` are those of its modulation.
  """

  features: int
  encoder: bool
  resample: str  # "halve", "double" or ""
  heads: int  # 0 for no attention
  norm: str
  dropout: float
  deterministic: bool
  clip: float  # 0 for no bound
  res_balance: float
  attn_balance: float
  concat_balance: float
  taps: tuple[float, ...]
  dtype: jnp.dtype

  def setup(self) -> None:
    self.modulation = Modulation(self.features, self.norm)

  @nn.compact
  def __call__(self, x: Array, vectors: Array, skip: Array | None = None) -> Array:
    conv = functools.partial(mp.Conv, self.features, self.dtype)
    parts, gains = (x,), (1.0,)
    if skip is not None:
      # The product takes both as they are; to concatenate them for it would cost memory
      # traffic.
      parts = (x, skip)
      gains = mp.concatenation_gains(x.shape[-1], skip.shape[-1], self.concat_balance)
      x = mp.concatenate(x, skip, self.concat_balance)
    if self.resample:
      x = resample(x, self.resample, self.taps)
      parts = (x,)
    main = x
    if x.shape[-1] != self.features:
      main = mp.Linear(self.features, self.dtype, name="skip")(parts, gains)
    if self.encoder:
      main = x = mp.pixel_norm(main)
    y = conv(name="in")(mp.silu(x))
    y = mp.silu(self.modulation(y, vectors))
    y = nn.Dropout(self.dropout, deterministic=self.deterministic)(y)
    x = mp.add(main, conv(name="out")(y), self.res_balance)
    if self.heads:
      y = Attention(self.heads, self.dtype, name="attention")(x)
      x = mp.add(x, y, self.attn_balance)
    bound = jnp.asarray(self.clip, x.dtype)
    return jax.lax.clamp(-bound, x, bound) if self.clip else x
