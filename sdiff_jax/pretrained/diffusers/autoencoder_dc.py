"""The deep compression autoencoder of SANA, AutoencoderDC of the diffusers format."""

import functools
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from msgspec import Meta

from sdiff_jax.models.layers import common
from sdiff_jax.models.layers.normalization import RMSNorm
from sdiff_jax.pretrained.diffusers import transformer_blocks as blocks
from sdiff_jax.pretrained.diffusers.sana_blocks import GatedConv, linear_attention
from sdiff_jax.pretrained.diffusers.unet_blocks import Conv
from sdiff_jax.pretrained.diffusers.vae import Autoencoder
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import (
  MAX_LEVELS,
  Channels,
  ChannelsOfLevels,
  Field,
  Positive,
)
from sdiff_jax.types import Array, Json, Params, PRNGKey

EPS = 1e-5
RATIO = 4.0  # hidden units of an MLP
MAX_BLOCKS = 1000
Kind = Literal["ResBlock", "EfficientViTBlock"]
Kinds = Annotated[list[Kind], Meta(min_length=1, max_length=MAX_LEVELS)]
Depths = Annotated[
  list[Annotated[int, Meta(ge=0, le=64)]], Meta(min_length=1, max_length=MAX_LEVELS)
]
Kernels = Annotated[list[Literal[1, 3, 5, 7, 9]], Meta(min_length=0, max_length=4)]
Scales = Annotated[list[Kernels], Meta(min_length=1, max_length=MAX_LEVELS)]
CHANNELS = (128, 256, 512, 512, 1024, 1024)
SCALES = ((), (), (), (5,), (5,), (5,))
FIELDS = {
  "in_channels": Field(3, Channels),
  "latent_channels": Field(32, Channels),
  "attention_head_dim": Field(32, Channels),
  "scaling_factor": Field(1.0, Positive),
  "upsample_block_type": Field(
    "pixel_shuffle", Literal["pixel_shuffle", "interpolate"]
  ),
  "downsample_block_type": Field("pixel_unshuffle", str),
  "encoder_out_shortcut": Field(True, bool),
  "decoder_in_shortcut": Field(True, bool),
  **{
    f"{name}_{field}": Field(default, type_)
    for name in ("encoder", "decoder")
    for field, default, type_ in (
      ("block_types", "ResBlock", Kind | Kinds),
      ("block_out_channels", CHANNELS, ChannelsOfLevels),
      ("layers_per_block", (2, 2, 2, 3, 3, 3), Depths),
      ("qkv_multiscales", SCALES, Scales),
    )
  },
}
FIELDS["decoder_layers_per_block"] = Field((3,) * 6, Depths)
SUPPORTED_VALUES = {
  "decoder_norm_types": ("rms_norm",),
  "decoder_act_fns": ("silu",),
  "decoder_conv_act_fn": ("relu",),
}


def shuffled(x: Array) -> Array:
  """Returns pixels of 4 C channels (C, row, column) as 2 x 2 pixels of C channels."""
  B, H, _, C = x.shape
  return blocks.from_patches(x.reshape(B, -1, C), 2, H, channels_last=False)


def unshuffled(x: Array) -> Array:
  """Returns 2 x 2 pixels of C channels as pixels of 4 C channels (C, row, column)."""
  B, H, W, _ = x.shape
  return blocks.patches(x, 2).reshape(B, H // 2, W // 2, -1)


def averaged(x: Array, features: int) -> Array:
  """Returns means of neighboring channels, [..., C] -> [..., features]."""
  return x.reshape(*x.shape[:-1], features, -1).mean(axis=-1)


class Residual(nn.Module):
  """x + norm(conv(silu(conv(x)))), [B, H, W, C]."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    conv = functools.partial(Conv, x.shape[-1], dtype=self.dtype)
    h = conv(use_bias=False, name="conv2")(nn.silu(conv(name="conv1")(x)))
    return x + RMSNorm(self.dtype, EPS, bias=True, name="norm")(h)


class MultiscaleAttention(nn.Module):
  """x + norm(linear(linear attention)), with further heads from larger neighborhoods.

  Queries, keys and values of these come from convolutions of each channel alone, then
  linear maps within each head (arXiv:2205.14756, section 3.1).
  """

  size: int  # of a head
  kernels: tuple[int, ...]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    B, H, W, C = x.shape
    count = C // self.size
    width = count * self.size
    dense = functools.partial(common.Dense, use_bias=False, dtype=self.dtype)
    conv = functools.partial(
      common.Conv, 3 * width, padding="SAME", use_bias=False, dtype=self.dtype
    )
    rows = [dense(width, name=name)(x) for name in ("to_q", "to_k", "to_v")]
    scales = [jnp.concatenate(rows, axis=-1)]
    for i, k in enumerate(self.kernels):
      at, groups = f"to_qkv_multiscale.{i}", 3 * width
      h = conv(kernel_size=(k, k), feature_group_count=groups, name=f"{at}.proj_in")(
        scales[0]
      )
      h = conv(
        kernel_size=(1, 1), feature_group_count=3 * count, name=f"{at}.proj_out"
      )(h)
      scales.append(h)
    whole = jnp.concatenate(scales, axis=-1).reshape(B, H * W, -1, 3, self.size)
    h = linear_attention(*jnp.moveaxis(whole, 3, 0)).reshape(B, H, W, -1)
    h = dense(C, name="to_out")(h)
    return x + RMSNorm(self.dtype, EPS, bias=True, name="norm_out")(h)


class VisionBlock(nn.Module):
  """Attention, then x + norm(gated convolution), [B, H, W, C]."""

  size: int
  kernels: tuple[int, ...]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = MultiscaleAttention(self.size, self.kernels, self.dtype, name="attn")(x)
    mlp = GatedConv(RATIO, self.dtype, name="conv_out")
    h = mlp(x)
    return x + RMSNorm(self.dtype, EPS, bias=True, name="conv_out.norm")(h)


class Down(nn.Module):
  """Halves the sides: a convolution, plus averages of the pixels if there is a shortcut."""

  features: int
  unshuffle: bool
  shortcut: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    if self.unshuffle:
      h = unshuffled(Conv(self.features // 4, dtype=self.dtype, name="conv")(x))
    else:
      h = Conv(self.features, strides=(2, 2), dtype=self.dtype, name="conv")(x)
    return h + averaged(unshuffled(x), self.features) if self.shortcut else h


class Up(nn.Module):
  """Doubles the sides: a convolution, plus the pixels themselves if there is a shortcut."""

  features: int
  interpolate: bool
  shortcut: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    if self.interpolate:
      h = x.repeat(2, 1).repeat(2, 2)
      h = Conv(self.features, dtype=self.dtype, name="conv")(h)
    else:
      h = shuffled(Conv(4 * self.features, dtype=self.dtype, name="conv")(x))
    if not self.shortcut:
      return h
    return h + shuffled(x.repeat(4 * self.features // x.shape[-1], -1))


class Coder(nn.Module):
  """The encoder, [B, H, W, 3] -> [B, h, w, C], or the decoder back.

  `start` is "encoder" or "decoder", the prefix of the names of its parameters.
  """

  start: str
  channels: tuple[int, ...]
  depths: tuple[int, ...]
  kinds: tuple[str, ...]
  scales: tuple[tuple[int, ...], ...]
  size: int
  out: int
  shuffle: bool  # pixels into channels, and back
  shortcut: bool
  remat: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = x.astype(self.dtype)
    return self._encode(x) if self.start == "encoder" else self._decode(x)

  def _encode(self, x: Array) -> Array:
    first = self._name("conv_in")
    if self.depths[0]:
      h = Conv(self.channels[0], dtype=self.dtype, name=first)(x)
    else:
      h = Down(self.channels[1], self.shuffle, False, self.dtype, name=first)(x)
    for i, depth in enumerate(self.depths):
      for j in range(depth):
        h = self._block(f"down_blocks.{i}.{j}", i, h)
      if depth and i < len(self.depths) - 1:
        form = self.channels[i + 1], self.shuffle, True, self.dtype
        h = Down(*form, name=self._name(f"down_blocks.{i}.{depth}"))(h)
    last = Conv(self.out, dtype=self.dtype, name=self._name("conv_out"))(h)
    return last + averaged(h, self.out) if self.shortcut else last

  def _decode(self, x: Array) -> Array:
    width = self.channels[-1]
    h = Conv(width, dtype=self.dtype, name=self._name("conv_in"))(x)
    h = h + x.repeat(width // x.shape[-1], -1) if self.shortcut else h
    for i, depth in reversed([*enumerate(self.depths)]):
      after = bool(depth and i < len(self.depths) - 1)
      if after:
        form = self.channels[i], not self.shuffle, True, self.dtype
        h = Up(*form, name=self._name(f"up_blocks.{i}.0"))(h)
      for j in range(depth):
        h = self._block(f"up_blocks.{i}.{j + after}", i, h)
    h = RMSNorm(self.dtype, EPS, bias=True, name=self._name("norm_out"))(h)
    last, h = self._name("conv_out"), nn.relu(h)
    if self.depths[0]:
      return Conv(self.out, dtype=self.dtype, name=last)(h)
    return Up(self.out, not self.shuffle, False, self.dtype, name=last)(h)

  def _block(self, name: str, level: int, h: Array) -> Array:
    if self.kinds[level] == "ResBlock":
      kind = common.remat(Residual, self.remat)
      return kind(self.dtype, name=self._name(name))(h)
    kind = common.remat(VisionBlock, self.remat)
    form = self.size, self.scales[level], self.dtype
    return kind(*form, name=self._name(name))(h)

  def _name(self, name: str) -> str:
    return f"{self.start}.{name}"


def from_config(
  config: dict[str, Json], *, dtype: str = "float32", remat: str = ""
) -> Autoencoder:
  """Returns the autoencoder of a config.json (arXiv:2410.10733).

  Its latents have no distribution: their standard deviation is 0.

  See `networks.FromConfig`.
  """
  c = config_fields.validated_config(config, FIELDS, SUPPORTED_VALUES)
  if c["in_channels"] != 3:
    raise ValueError(
      f"in_channels={c['in_channels']}: must be 3, the colors of an image"
    )
  z, down, up = (
    c[k] for k in ("latent_channels", "downsample_block_type", "upsample_block_type")
  )
  encoder = _coder(
    c, "encoder", z, down == "pixel_unshuffle", c["encoder_out_shortcut"], remat, dtype
  )
  decoder = _coder(
    c, "decoder", 3, up == "pixel_shuffle", c["decoder_in_shortcut"], remat, dtype
  )
  factor = 2 ** (len(encoder.channels) - 1)
  if len(decoder.channels) != len(encoder.channels):
    raise ValueError(
      f"decoder_block_out_channels={[*decoder.channels]}: must have "
      f"{len(encoder.channels)} levels, as encoder_block_out_channels"
    )

  def init(key: PRNGKey) -> Params:
    keys = jax.random.split(key)
    x = jnp.zeros((1, factor, factor, 3), dtype)
    params = encoder.init(keys[0], x)["params"]
    return params | decoder.init(keys[1], jnp.zeros((1, 1, 1, z), dtype))["params"]

  def encode(params: Params, images: Array) -> tuple[Array, Array]:
    if images.shape[1] % factor or images.shape[2] % factor:
      raise ValueError(f"images: {factor} must divide their sides, got {images.shape}")
    mean = common.to_accumulation_dtype(encoder.apply({"params": params}, images))
    return mean, jnp.zeros_like(mean)

  def decode(params: Params, latents: Array) -> Array:
    return common.to_accumulation_dtype(decoder.apply({"params": params}, latents))

  return Autoencoder(init, encode, decode, factor, z, c["scaling_factor"])


def _coder(
  c: dict[str, Json],
  start: str,
  out: int,
  shuffle: bool,
  shortcut: bool,
  remat: str,
  dtype: str,
) -> Coder:
  """Returns the encoder or the decoder of the fields of a config."""
  channels = tuple(c[f"{start}_block_out_channels"])
  depths, kinds, scales = (
    config_fields.each(c[f"{start}_{name}"], len(channels), f"{start}_{name}")
    for name in ("layers_per_block", "block_types", "qkv_multiscales")
  )
  size, z = c["attention_head_dim"], c["latent_channels"]
  attends = [C for C, kind in zip(channels, kinds, strict=True) if kind != "ResBlock"]
  if any(C % size for C in attends):
    raise ValueError(
      f"attention_head_dim={size}: must divide each of {start}_block_out_channels that "
      "has attention"
    )
  if len(channels) < 2 or any(depth == 0 for depth in depths[1:]):
    raise ValueError(
      f"{start}_layers_per_block={[*depths]}: must be for 2 levels or more, of which the "
      "first alone may be 0"
    )
  if sum(depths) > MAX_BLOCKS:
    raise ValueError(
      f"{start}_layers_per_block={[*depths]}: must make at most {MAX_BLOCKS} blocks"
    )
  pairs = zip(
    channels[depths[0] == 0 :], channels[(depths[0] == 0) + 1 :], strict=False
  )
  fits = all(4 * a % b == 0 for a, b in pairs) and not any(C % 4 for C in channels)
  if not fits or (shortcut and channels[-1] % z):
    raise ValueError(
      f"{start}_block_out_channels={[*channels]}: must be multiples of 4, each a divisor "
      f"of 4 times the one before, and the last one a multiple of latent_channels={z}"
    )
  return Coder(
    start=start,
    channels=channels,
    depths=depths,
    kinds=kinds,
    scales=tuple(map(tuple, scales)),
    size=size,
    out=out,
    shuffle=shuffle,
    shortcut=shortcut,
    remat=remat,
    dtype=jnp.dtype(dtype),
  )
