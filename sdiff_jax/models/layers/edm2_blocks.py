"""Residual blocks of EDM2's U-Net and their modulation by the embedding."""

import functools

import flax.linen as nn
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
  modulation.
  """

  norm: str

  @nn.compact
  def __call__(self, y: Array, emb: Array) -> Array:
    def linear(name: str) -> Array:
      return mp.Linear(y.shape[-1], name=name)(emb)[:, None, None]

    if self.norm == "double":
      s, b = (
        mp.pixel_norm(linear(name)).astype(y.dtype) for name in ("scale", "shift")
      )
      return mp.pixel_norm(y) * s + b
    gain = self.param("gain", nn.initializers.zeros, ())
    return y * (1 + gain * linear("scale")).astype(y.dtype)


class Attention(nn.Module):
  """Cosine attention: queries, keys and values of unit norm, [B, H, W, C] -> [B, H, W, C]."""

  heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    B, H, W, C = x.shape
    y = mp.Linear(3 * C, self.dtype, name="qkv")(x)
    # Query, key and value of a channel are adjacent, the order of published weights.
    y = y.reshape(B, H * W, self.heads, C // self.heads, 3)
    q, k, v = jnp.moveaxis(mp.normalize(y, (-2,)), -1, 0)
    y = attention(q, k, v).reshape(x.shape)
    return mp.Linear(C, self.dtype, name="proj")(y)


class Block(nn.Module):
  """A residual block: resampling, two convolutions, attention.

  [B, H, W, C] -> [B, H, W, features]; height and width may be halved or doubled. Blocks of
  the encoder normalize the main path; blocks of the decoder concatenate `skip` to it.
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

  @nn.compact
  def __call__(self, x: Array, emb: Array, skip: Array | None = None) -> Array:
    conv = functools.partial(mp.Conv, self.features, self.dtype)
    if skip is not None:
      x = mp.concatenate(x, skip, self.concat_balance)
    if self.resample:
      x = resample(x, self.resample, self.taps)
    main = x
    if x.shape[-1] != self.features:
      main = mp.Linear(self.features, self.dtype, name="skip")(x)
    if self.encoder:
      main = x = mp.pixel_norm(main)
    y = conv(name="in")(mp.silu(x))
    y = mp.silu(Modulation(self.norm, name="modulation")(y, emb))
    y = nn.Dropout(self.dropout, deterministic=self.deterministic)(y)
    x = mp.add(main, conv(name="out")(y), self.res_balance)
    if self.heads:
      y = Attention(self.heads, self.dtype, name="attention")(x)
      x = mp.add(x, y, self.attn_balance)
    return jnp.clip(x, -self.clip, self.clip) if self.clip else x
