"""The U-Nets DDPM++ and NCSN++ in EDM's form, with or without double normalization."""

import functools
from collections.abc import Callable
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.fields import DType, Positive, Range, Rate, Size
from sdiff_jax.kernels.attention import attention
from sdiff_jax.models.layers import common, conditioning, linen, resampling
from sdiff_jax.models.layers.resampling import resample
from sdiff_jax.types import Array, Cond, CondSpecs, Network

HALF = 0.5**0.5  # factor that keeps the variance of a sum of two terms

Multiplier = Annotated[int, Range(1, 64)]

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros
Dense = functools.partial(common.Dense, kernel_init=xavier)
Conv = functools.partial(common.Conv, kernel_size=(3, 3), kernel_init=xavier)


def group_norm(x: Array) -> Array:
  """Returns x [B, ..., C] with mean 0 and variance 1 in min(32, C / 4) groups."""
  w = common.to_accumulation_dtype(x)
  groups = min(32, x.shape[-1] // 4)
  w = w.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
  w -= jnp.mean(w, (1, 3), keepdims=True)
  w *= jax.lax.rsqrt(jnp.mean(jnp.square(w), (1, 3), keepdims=True) + common.EPS)
  return w.reshape(x.shape).astype(x.dtype)


class GroupNorm(nn.Module):
  """group_norm(x) * scale + bias, [B, ..., C] -> [B, ..., C]."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, shape).astype(self.dtype)
    bias = self.param("bias", zeros, shape).astype(self.dtype)
    ones = (1,) * (x.ndim - 1)
    return group_norm(x) * scale.reshape(*ones, -1) + bias.reshape(*ones, -1)


class Block(nn.Module):
  """Two convolutions, modulated between them, then attention with one head.

  [B, H, W, C] -> [B, H, W, features]; height and width may be doubled or halved before
  the first convolution.
  """

  features: int
  resample: str  # "up", "down" or ""
  attention: bool
  taps: tuple[float, ...]
  norm: str
  dropout: float
  deterministic: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, emb: Array) -> Array:
    def resampled(x: Array) -> Array:
      up = self.resample == "up"
      return resample(x, self.taps, up=up) if self.resample else x

    h = resampled(nn.silu(GroupNorm(self.dtype, name="norm0")(x)))
    h = Conv(self.features, dtype=self.dtype, name="conv0")(h)
    if self.norm == "single":
      shift = Dense(self.features, dtype=self.dtype, name="affine")(emb)
      h = GroupNorm(self.dtype, name="norm1")(h + shift[:, None, None])
    else:
      h = common.AdaptiveDoubleNorm(self.dtype, group_norm, name="norm1")(h, emb)
    h = nn.Dropout(self.dropout, deterministic=self.deterministic)(nn.silu(h))
    h = Conv(self.features, dtype=self.dtype, kernel_init=zeros, name="conv1")(h)
    if self.resample or x.shape[-1] != self.features:
      x = Dense(self.features, dtype=self.dtype, name="skip")(resampled(x))
    x = (x + h) * HALF
    return (x + self._attention(x)) * HALF if self.attention else x

  def _attention(self, x: Array) -> Array:
    B, H, W, C = x.shape
    quiet = nn.initializers.variance_scaling(0.2, "fan_avg", "uniform")
    h = GroupNorm(self.dtype, name="norm2")(x)
    h = common.Dense(3 * C, dtype=self.dtype, kernel_init=quiet, name="qkv")(h)
    # Query, key and value of a channel are adjacent, the order of published weights.
    q, k, v = jnp.moveaxis(h.reshape(B, H * W, 1, C, 3), -1, 0)
    h = attention(q, k, v).reshape(x.shape)
    return common.Dense(C, dtype=self.dtype, kernel_init=zeros, name="proj")(h)


class Unet(nn.Module):
  """F(x, t, cond) of images x [B, H, W, C] at times t [B] -> [B, H, W, C]."""

  channels: int
  channel_mult: tuple[int, ...]
  blocks: int
  attn_resolutions: tuple[int, ...]
  encoder: str
  decoder: str
  taps: tuple[float, ...]
  norm: str
  dropout: float
  block: type[nn.Module]
  embedding: nn.Module
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, t: Array, cond: Cond, *, deterministic: bool) -> Array:
    emb = self.embedding(t, cond)

    def block(name: str, h: Array, features: int, resample="", attention=False):
      fields = (self.taps, self.norm, self.dropout, deterministic, self.dtype)
      return self.block(features, resample, attention, *fields, name=name)(h, emb)

    _, H, W, C = x.shape
    levels = [  # name of the resolution, features, whether it has attention
      (f"{H >> i}x{W >> i}", self.channels * mult, H >> i in self.attn_resolutions)
      for i, mult in enumerate(self.channel_mult)
    ]
    h, skips = self._encode(x.astype(self.dtype), levels, block)
    return self._decode(h, skips, levels, C, block)

  def _encode(
    self, x: Array, levels: list, block: Callable
  ) -> tuple[Array, list[Array]]:
    """Returns the last hidden state and the list of all of them."""
    h = Conv(self.channels, dtype=self.dtype, name=f"enc_{levels[0][0]}_conv")(x)
    aux, skips = x, []
    for i, (at, width, attends) in enumerate(levels):
      if i:
        h = block(f"enc_{at}_down", h, h.shape[-1], "down")
      if i and self.encoder == "skip":
        aux = resample(aux, self.taps)
        h += Dense(h.shape[-1], dtype=self.dtype, name=f"enc_{at}_aux_skip")(aux)
      if i and self.encoder == "residual":
        pad, name = 1 + (len(self.taps) - 1) // 2, f"enc_{at}_aux_residual"
        conv = Conv(h.shape[-1], padding=pad, dtype=self.dtype, name=name)
        h = aux = (h + resample(conv(aux), self.taps, pad=0)) * HALF
      skips.append(h)
      for j in range(self.blocks):
        h = block(f"enc_{at}_block{j}", h, width, attention=attends)
        skips.append(h)
    return h, skips

  def _decode(
    self, h: Array, skips: list[Array], levels: list, channels: int, block: Callable
  ) -> Array:
    """Returns the output image; with decoder="skip" it is a sum over all resolutions."""
    aux = None
    for i, (at, width, attends) in reversed([*enumerate(levels)]):
      if i == len(levels) - 1:
        h = block(f"dec_{at}_in0", h, h.shape[-1], attention=True)
        h = block(f"dec_{at}_in1", h, h.shape[-1])
      else:
        h = block(f"dec_{at}_up", h, h.shape[-1], "up")
      for j in range(self.blocks + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        last = j == self.blocks
        h = block(f"dec_{at}_block{j}", h, width, attention=attends and last)
      if self.decoder == "skip" or i == 0:
        image = nn.silu(GroupNorm(self.dtype, name=f"dec_{at}_aux_norm")(h))
        conv = functools.partial(Conv, kernel_init=zeros, dtype=self.dtype)
        image = conv(channels, name=f"dec_{at}_aux_conv")(image)
        aux = image if aux is None else resample(aux, self.taps, up=True) + image
    return aux


@registry.register(
  "models",
  "ddpmpp",
  sample_ndim=3,
  minimal={
    "shape": (4, 6, 3),
    "channels": 8,
    "channel_mult": (1,),
    "blocks": 0,
    "attn_resolutions": (),
  },
  tiny={"channels": 8, "channel_mult": (1, 2), "blocks": 1, "attn_resolutions": (4,)},
  without_remat=lambda fields: {"remat": ""},
)
def build(
  *,
  shape: tuple[int, ...],
  cond: CondSpecs,
  sigma_d: Positive,
  process: common.Process = "trigflow",
  norm: common.Norm = "double",
  embedding: common.TimeEmbedding = "positional",
  encoder: Literal["standard", "skip", "residual"] = "standard",
  decoder: Literal["standard", "skip"] = "standard",
  resample_filter: resampling.Taps = (1, 1),
  channels: Size = 128,
  channel_mult: common.Multipliers = (2, 2, 2),
  emb_mult: Multiplier = 4,
  noise_mult: Multiplier = 1,
  blocks: Annotated[int, Range(0, 1000)] = 4,
  attn_resolutions: common.Heights = (16,),
  augment: Annotated[int, Range(0, 65_536)] = 0,
  dropout: Rate = 0.0,
  guidance: bool = False,
  remat: common.Remat = "",
  dtype: DType = "float32",
) -> Network:
  """Returns the U-Net as a Network; the defaults are DDPM++ for CIFAR-10.

  DDPM++ and NCSN++ (arXiv:2011.13456, appendix C) as EDM has them (arXiv:2206.00364,
  table 7). NCSN++ is embedding="fourier", noise_mult=2, encoder="residual",
  resample_filter=(1, 3, 3, 1). A network that EDM published is process="edm",
  norm="single", augment=9.

  Args:
    shape: (H, W, C) of one sample.
    cond: conditions of one sample by name, as the data set declares them.
    sigma_d: standard deviation of the data.
    process: "trigflow", or "edm": the network is EDM's inner one, whose time
      is ln(sigma) / 4, and F is its change of variables (`trigflow.from_edm`).
    norm: how a block is modulated: "double", by the adaptive double norm, or "single",
      by adding the embedding before the norm (EDM).
    embedding: of the time, "positional" or "fourier".
    encoder: "standard"; "skip" and "residual" also feed the image at every resolution.
    decoder: "standard", or "skip", whose output is a sum of images of all resolutions.
    resample_filter: coefficients of the filter for resampling, along one axis.
    channels: number of channels at multiplier 1.
    channel_mult: multiplier of each resolution, from the highest.
    emb_mult: width of the embedding as a multiple of channels.
    noise_mult: width of the features of the time as a multiple of channels.
    blocks: number of residual blocks of each resolution.
    attn_resolutions: heights (pixels) of the resolutions with attention.
    augment: size of the condition "augment" [B, augment], EDM's augmentation labels.
    dropout: dropout rate inside the blocks.
    guidance: whether the scale of classifier-free guidance is an input.
    remat: what a block recomputes in the backward pass: "" nothing, "weights" what it
      gathers from other devices, "dots" everything
      but matrix products and convolutions, "full" everything.
    dtype: dtype of the hidden layers; parameters are float32.

  Raises:
    ValueError: an unknown option, or sizes that do not divide.

  Example:
    >>> import jax
    >>> options = {"channels": 8, "channel_mult": (1,), "blocks": 1, "attn_resolutions": ()}
    >>> network = build(shape=(4, 4, 1), cond={}, sigma_d=0.5, **options)
    >>> params = jax.eval_shape(network.init, jax.random.key(0))
    >>> sorted(params)
    ['logvar', 'net']
  """
  factor = 2 ** (len(channel_mult) - 1)
  if len(shape) != 3 or shape[0] % factor or shape[1] % factor:
    raise ValueError(
      f"channel_mult={channel_mult}: {factor} must divide height and width of {shape}"
    )
  if channels % (32 if channels * max(channel_mult) > 64 else 4):
    raise ValueError(
      f"channels={channels}: must be a multiple of 4, and of 32 where a "
      "resolution has more than 64 channels"
    )
  resampling.check_filter(resample_filter)
  conditions = conditioning.conditions(cond, guidance=guidance)
  module = Unet(
    channels=channels,
    channel_mult=tuple(channel_mult),
    blocks=blocks,
    attn_resolutions=tuple(attn_resolutions),
    encoder=encoder,
    decoder=decoder,
    taps=tuple(resample_filter),
    norm=norm,
    dropout=dropout,
    block=common.remat(Block, remat),
    embedding=conditioning.EDMEmbedding(
      features=channels * noise_mult,
      width=channels * emb_mult,
      kind=embedding,
      conditions=conditions,
      augment=augment,
      dtype=jnp.dtype(dtype),
    ),
    dtype=jnp.dtype(dtype),
  )
  net = linen.as_network(module, shape=shape, conditions=conditions)
  return linen.trigflow_from_edm(net, sigma_d) if process == "edm" else net
