"""The autoencoder of Stable Diffusion, AutoencoderKL of the diffusers format."""

import functools
from collections.abc import Callable
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from msgspec import Meta

from sdiff_jax.models.layers import common as common_lib
from sdiff_jax.pretrained.diffusers.unet_blocks import (
  Conv,
  Downsample,
  GroupNorm,
  Resnet,
  SelfAttention,
  Upsample,
)
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import (
  Channels,
  ChannelsOfLevels,
  Field,
  Layers,
  Names,
  Positive,
)
from sdiff_jax.types import Array, Json, Params, PRNGKey

EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)  # of the posterior
MAX_BLOCKS = 1000
Shift = Annotated[float, Meta(ge=-1e6, le=1e6)]
FIELDS = {
  "in_channels": Field(3, Channels),
  "out_channels": Field(3, Channels),
  "down_block_types": Field(("DownEncoderBlock2D",), Names),
  "up_block_types": Field(("UpDecoderBlock2D",), Names),
  "block_out_channels": Field((64,), ChannelsOfLevels),
  "layers_per_block": Field(1, Layers),
  "latent_channels": Field(4, Channels),
  "norm_num_groups": Field(32, Channels),
  "scaling_factor": Field(0.18215, Positive),
  "shift_factor": Field(None, Shift | None),
  "use_quant_conv": Field(True, bool),
  "use_post_quant_conv": Field(True, bool),
  "mid_block_add_attention": Field(True, bool),
}
SUPPORTED_VALUES = {
  "act_fn": ("silu", "swish"),
  "latents_mean": (None,),
  "latents_std": (None,),
}
IGNORED_FIELDS = ("sample_size", "force_upcast")


class Autoencoder(NamedTuple):
  """Encoder from images to latents, and decoder.

  Attributes:
    init: (key) -> params.
    encode: (params, images [B, H, W, 3] in [-1, 1]) -> mean and standard deviation of
      the latents, [B, h, w, C] each, in float32 or wider.
    decode: (params, latents [B, h, w, C]) -> images [B, H, W, 3], about in [-1, 1].
    factor: H / h.
    channels: C.
    scaling: factor of the latents that a diffusion model is trained on.
    shift: what is subtracted from them before.
  """

  init: Callable[[PRNGKey], Params]
  encode: Callable[[Params, Array], tuple[Array, Array]]
  decode: Callable[[Params, Array], Array]
  factor: int
  channels: int
  scaling: float
  shift: float = 0.0


class Coder(nn.Module):
  """The encoder, [B, H, W, 3] -> [B, h, w, 2 C], or the decoder, [B, h, w, C] back.

  `start` is "encoder" or "decoder", the prefix of the names of its parameters.
  """

  start: str
  channels: tuple[int, ...]
  depth: int
  out: int
  groups: int
  attends: bool
  quant: bool
  remat: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = x.astype(self.dtype)
    if self.start == "encoder":
      h = self._levels("down", self._conv("conv_in", self.channels[0], x))
      return self._linear("quant_conv", self._last(self._middle(h)))
    h = self._conv("conv_in", self.channels[-1], self._linear("post_quant_conv", x))
    return self._last(self._levels("up", self._middle(h)))

  def _levels(self, way: str, h: Array) -> Array:
    up = way == "up"
    for i, features in enumerate(self.channels[::-1] if up else self.channels):
      for j in range(self.depth + up):  # the decoder has one more
        h = self._resnet(f"{way}_blocks.{i}.resnets.{j}", features, h)
      if i < len(self.channels) - 1:
        name = f"{self.start}.{way}_blocks.{i}.{way}samplers.0"
        make = Upsample if up else functools.partial(Downsample, 0)
        h = make(self.dtype, name=name)(h)
    return h

  def _middle(self, h: Array) -> Array:
    h = self._resnet("mid_block.resnets.0", self.channels[-1], h)
    if self.attends:
      name = f"{self.start}.mid_block.attentions.0"
      h = SelfAttention(1, self.groups, EPS, self.dtype, name=name)(h)
    return self._resnet("mid_block.resnets.1", self.channels[-1], h)

  def _resnet(self, at: str, features: int, h: Array) -> Array:
    kind = common_lib.remat(Resnet, self.remat)
    sizes = features, self.groups, EPS, self.dtype
    return kind(*sizes, name=f"{self.start}.{at}")(h)

  def _conv(self, name: str, features: int, h: Array) -> Array:
    return Conv(features, dtype=self.dtype, name=f"{self.start}.{name}")(h)

  def _last(self, h: Array) -> Array:
    norm = functools.partial(GroupNorm, self.groups, epsilon=EPS, dtype=self.dtype)
    h = nn.silu(norm(name=f"{self.start}.conv_norm_out")(h))
    return self._conv("conv_out", self.out, h)

  def _linear(self, name: str, h: Array) -> Array:
    return nn.Dense(h.shape[-1], dtype=self.dtype, name=name)(h) if self.quant else h


def from_config(
  config: dict[str, Json], *, dtype: str = "float32", remat: str = ""
) -> Autoencoder:
  """Returns the autoencoder of a config.json (arXiv:2112.10752, appendix G).

  See `networks.FromConfig`.
  """
  c = config_fields.validated_config(config, FIELDS, SUPPORTED_VALUES, IGNORED_FIELDS)
  channels = tuple(c["block_out_channels"])
  for field, word in (
    ("down_block_types", "DownEncoderBlock2D"),
    ("up_block_types", "UpDecoderBlock2D"),
  ):
    if [*c[field]] != [word] * len(channels):
      names = config_fields.quoted([*c[field]])
      raise ValueError(f"{field}={names}: must be {word} for each of {channels}")
  if any(width % c["norm_num_groups"] for width in channels):
    raise ValueError(
      f"norm_num_groups={c['norm_num_groups']}: must divide each of {channels}"
    )
  if (2 * c["layers_per_block"] + 1) * len(channels) > MAX_BLOCKS:
    raise ValueError(
      f"layers_per_block={c['layers_per_block']}: with the {len(channels)} levels of "
      f"block_out_channels must make at most {MAX_BLOCKS} blocks"
    )
  for field in ("in_channels", "out_channels"):
    if c[field] != 3:
      raise ValueError(f"{field}={c[field]}: must be 3, the colors of an image")
  common = {"channels": channels, "depth": c["layers_per_block"], "remat": remat}
  common |= {"groups": c["norm_num_groups"], "attends": c["mid_block_add_attention"]}
  common |= {"dtype": jnp.dtype(dtype)}
  z = c["latent_channels"]
  encoder = Coder("encoder", out=2 * z, quant=c["use_quant_conv"], **common)
  image_channels, quant = c["out_channels"], c["use_post_quant_conv"]
  decoder = Coder("decoder", out=image_channels, quant=quant, **common)
  factor = 2 ** (len(channels) - 1)

  def init(key: PRNGKey) -> Params:
    keys = jax.random.split(key)
    x = jnp.zeros((1, factor, factor, c["in_channels"]), dtype)
    params = encoder.init(keys[0], x)["params"]
    return params | decoder.init(keys[1], jnp.zeros((1, 1, 1, z), dtype))["params"]

  def encode(params: Params, images: Array) -> tuple[Array, Array]:
    if images.shape[1] % factor or images.shape[2] % factor:
      raise ValueError(f"images: {factor} must divide their sides, got {images.shape}")
    moments = common_lib.to_accumulation_dtype(
      encoder.apply({"params": params}, images)
    )
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(jnp.clip(logvar, *LOGVAR_RANGE) / 2)

  def decode(params: Params, latents: Array) -> Array:
    return common_lib.to_accumulation_dtype(decoder.apply({"params": params}, latents))

  scaling, shift = c["scaling_factor"], c["shift_factor"] or 0.0
  return Autoencoder(init, encode, decode, factor, z, scaling, shift)
