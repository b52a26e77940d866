"""The U-Net that DDPM and Stable Diffusion share, in the diffusers format."""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from sdiff_jax.models.layers import common
from sdiff_jax.pretrained.diffusers.clip_text import Text
from sdiff_jax.pretrained.diffusers.networks import TIME_IDS, Predictor
from sdiff_jax.pretrained.diffusers.unet_blocks import (
  LISTS,
  Conv,
  Downsample,
  GroupNorm,
  Resnet,
  SelfAttention,
  Transformer,
  Upsample,
)
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import (
  Channels,
  ChannelsOfLevels,
  Field,
  Fraction,
  Layers,
  LayersOfLevels,
)
from sdiff_jax.types import Array, Cond, Json, Params, PRNGKey

Side = Annotated[int, Meta(ge=1, le=1024)]  # of the samples
Sides = Annotated[list[Side], Meta(min_length=2, max_length=2)]
MAX_BLOCKS = 1000  # resnets and transformer blocks of all levels
GUIDANCE_UNIT = 1000  # the embedding of a guidance scale is that of 1000 (scale - 1)
GUIDANCE_FEATURES = 256  # sines and cosines of it
FIELDS = {  # of fields that both classes have
  "sample_size": Field(None, Side | Sides | None),
  "layers_per_block": Field(2, Layers | LayersOfLevels),
  "norm_num_groups": Field(32, Channels),
  "norm_eps": Field(1e-5, Fraction),
  "freq_shift": Field(0, Annotated[float, Meta(ge=0, le=1)]),
  "flip_sin_to_cos": Field(True, bool),
  "downsample_padding": Field(1, Literal[0, 1]),
  "time_embedding_dim": Field(None, Channels | None),
  "attention_head_dim": Field(8, Channels | ChannelsOfLevels | None),
  "end_time": Field(False, bool),  # of flow maps, which diffusers does not have
}
UNSUPPORTED_FIELDS = (None, False)
SUPPORTED_VALUES = {
  "act_fn": ("silu", "swish"),
  "center_input_sample": UNSUPPORTED_FIELDS,
  "class_embed_type": UNSUPPORTED_FIELDS,
  "mid_block_scale_factor": (1,),
  "num_class_embeds": UNSUPPORTED_FIELDS,
  "resnet_time_scale_shift": ("default",),
  "time_embedding_type": ("positional",),
}


class Unet(nn.Module):
  """Predicts from (x [B, H, W, C], time [B], text [B, L, E] or None).

  Levels are listed from the highest resolution on, also in `up`. A network may also take
  a guidance scale [B], pooled text [B, P] with the sizes of the image [B, 6], and the
  timestep [B] at which a flow map ends.
  """

  channels: tuple[int, ...]
  depth: tuple[int, ...]  # resnets of each level of the encoder
  down: tuple[str, ...]
  mid: str
  up: tuple[str, ...]
  heads: tuple[int, ...]
  blocks: tuple[int, ...]  # of the transformer of each level
  out: int
  groups: int
  eps: float
  time: dict[str, Json]
  end_time: bool  # whether it is a flow map
  size_features: int | None  # of the embedding of each of the sizes
  padding: int
  remat: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x: Array,
    time: Array,
    text: Array | None = None,
    guidance: Array | None = None,
    pooled: Array | None = None,
    sizes: Array | None = None,
    end: Array | None = None,
  ) -> Array:
    embed = Time(**self.time, dtype=self.dtype, name="time_embedding")
    emb = embed(time, guidance, end)
    if self.size_features:
      emb += self._added(pooled, sizes)
    text = None if text is None else text.astype(self.dtype)

    def make(kind: type[nn.Module], *sizes: Any, name: str) -> nn.Module:
      kind = common.remat(kind, self.remat)
      return kind(*sizes, self.dtype, name=name)

    def block(at: str, j: int, level: int, attends: str, h: Array) -> Array:
      norm = self.groups, self.eps
      resnet = make(Resnet, self.channels[level], *norm, name=f"{at}.resnets.{j}")
      h, name, heads = resnet(h, emb), f"{at}.attentions.{j}", self.heads[level]
      if attends == "self":
        return make(SelfAttention, heads, *norm, name=name)(h)
      if attends == "text":
        sizes = heads, self.blocks[level], self.groups
        return make(Transformer, *sizes, name=name)(h, text)
      return h

    h = Conv(self.channels[0], dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
    h, skips = self._encode(h, block)
    last = len(self.channels) - 1
    h = block("mid_block", 0, last, self.mid, h)
    h = block("mid_block", 1, last, "none", h)
    h = self._decode(h, skips, block)
    norm = functools.partial(GroupNorm, self.groups, epsilon=self.eps)
    h = nn.silu(norm(dtype=self.dtype, name="conv_norm_out")(h))
    return Conv(self.out, dtype=self.dtype, name="conv_out")(h)

  def _added(self, pooled: Array, sizes: Array) -> Array:
    """Returns the embedding of pooled text and of sizes (arXiv:2307.01952, 2.2)."""
    form = self.time["shift"], self.time["cosines_first"]
    each = waves(sizes.reshape(-1), self.size_features, *form)
    both = [pooled.astype(each.dtype), each.reshape(len(sizes), -1)]
    h = jnp.concatenate(both, axis=-1).astype(self.dtype)
    dense = functools.partial(common.Dense, self.time["width"], dtype=self.dtype)
    h = nn.silu(dense(name="add_embedding.linear_1")(h))
    return dense(name="add_embedding.linear_2")(h)

  def _encode(self, h: Array, block: Callable) -> tuple[Array, list[Array]]:
    """Returns the last hidden state, and the list of all of them."""
    skips = [h]
    for i, attends in enumerate(self.down):
      for j in range(self.depth[i]):
        h = block(f"down_blocks.{i}", j, i, attends, h)
        skips.append(h)
      if i < len(self.down) - 1:
        name = f"down_blocks.{i}.downsamplers.0"
        h = Downsample(self.padding, self.dtype, name=name)(h)
        skips.append(h)
    return h, skips

  def _decode(self, h: Array, skips: list[Array], block: Callable) -> Array:
    for i, level in enumerate(reversed(range(len(self.up)))):
      for j in range(self.depth[level] + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = block(f"up_blocks.{i}", j, level, self.up[level], h)
      if level:
        h = Upsample(self.dtype, name=f"up_blocks.{i}.upsamplers.0")(h)
    return h


def waves(t: Array, features: int, shift: float, cosines_first: bool) -> Array:
  """Returns sines and cosines of t at frequencies 10000^(-i / (features / 2 - shift)).

  Args:
    t: what to embed, [B].
    features: number of sines and cosines, even.
    shift: see the formula; below features / 2.
    cosines_first: whether the cosines stand before the sines.

  Returns:
    [B, features].

  Example:
    >>> waves(jnp.zeros(1), 4, 0.0, True).tolist()
    [[1.0, 1.0, 0.0, 0.0]]
  """
  half = features // 2
  frequencies = 10_000.0 ** -(np.arange(half) / (half - shift))
  angles = t[:, None] * frequencies.astype(t.dtype)[None]
  both = [jnp.sin(angles), jnp.cos(angles)]
  return jnp.concatenate(both[::-1] if cosines_first else both, axis=-1)


class Time(nn.Module):
  """Embeds a timestep in [0, T), [B] -> [B, width].

  A distilled network may add linear maps, which start at zero, to the sines and cosines:
  of its guidance scale [B] (arXiv:2310.04378, section 4.2), and, if it is a flow map, of
  the sines and cosines of the timestep [B] at which it ends.
  """

  features: int
  width: int
  shift: float
  cosines_first: bool
  dtype: jnp.dtype
  guidance_features: int | None = GUIDANCE_FEATURES
  starts_at_zero: bool = False

  @nn.compact
  def __call__(
    self, t: Array, guidance: Array | None = None, end: Array | None = None
  ) -> Array:
    own = self.features, self.shift, self.cosines_first
    h = waves(t, *own).astype(self.dtype)
    dense = functools.partial(common.Dense, dtype=self.dtype)
    zero = {"use_bias": False, "kernel_init": nn.initializers.zeros}
    if guidance is not None:
      scale = GUIDANCE_UNIT * (guidance - 1)
      scale = waves(scale, self.guidance_features, 1.0, False).astype(self.dtype)
      h += dense(self.features, name="cond_proj", **zero)(scale)
    if end is not None:
      ends = waves(end, *own).astype(self.dtype)
      h += dense(self.features, name="end_proj", **zero)(ends)
    h = nn.silu(dense(self.width, name="linear_1")(h))
    last = {"kernel_init": nn.initializers.zeros} if self.starts_at_zero else {}
    return dense(self.width, name="linear_2", **last)(h)


def predictor(
  c: dict[str, Json],
  *,
  kinds: dict[str, str],
  mid: str,
  heads: tuple[int, ...],
  text: int | None,
  dtype: str,
  remat: str,
  pooled: int | None = None,
) -> Predictor:
  """Returns the U-Net of the fields of a config.

  Args:
    c: all fields of the config.
    kinds: prefix of the name of a block -> its attention, "none", "self" or "text".
    mid: attention of the middle block.
    heads: number of heads of each level.
    text: size of the text embeddings, or None.
    pooled: size of the embedding of a whole text, which comes with the sizes of the
      image, or None.
    dtype: type of the hidden layers.
    remat: what a block recomputes in the backward pass: "" nothing, "weights" what it
      gathers from other devices, "dots" everything
      but matrix products and convolutions, "full" everything.

  Raises:
    ValueError: sizes that do not fit; the message starts with the field.
  """
  if c["out_channels"] != c["in_channels"]:
    raise ValueError(
      f"out_channels={c['out_channels']}: must be in_channels={c['in_channels']}, since "
      "the network predicts a value for each of its inputs"
    )
  channels = tuple(c["block_out_channels"])
  levels, groups = len(channels), c["norm_num_groups"]
  if channels[0] // 2 <= c["freq_shift"]:
    raise ValueError(
      f"block_out_channels={[*channels]}: the first must be above "
      f"{2 * int(c['freq_shift']) + 1} for freq_shift={c['freq_shift']}"
    )
  down = _attention(c, "down_block_types", kinds, "DownBlock2D")
  up = _attention(c, "up_block_types", kinds, "UpBlock2D")[::-1]
  attends = zip(channels, heads, down, up, strict=True)
  wrong = [n for C, n, *kind in attends if {*kind} != {"none"} and C % n]
  if wrong or channels[-1] % heads[-1] or any(C % groups for C in channels):
    raise ValueError(
      f"block_out_channels={[*channels]}: norm_num_groups={groups}, and the heads "
      f"{[*heads]} of attention_head_dim, must divide them"
    )
  depth = config_fields.each(c["layers_per_block"], levels, "layers_per_block")
  blocks = config_fields.each(
    c.get("transformer_layers_per_block", 1), levels, "transformer_layers_per_block"
  )
  count = sum((2 * n + 1) * (1 + m) for n, m in zip(depth, blocks, strict=True))
  if count > MAX_BLOCKS:
    raise ValueError(
      f"layers_per_block={[*depth]}: with block_out_channels and "
      f"transformer_layers_per_block must make at most {MAX_BLOCKS} blocks, not {count}"
    )
  factor = 2 ** (levels - 1)
  size = config_fields.each(c["sample_size"] or factor, 2, "sample_size")
  if any(side % factor for side in size):
    raise ValueError(
      f"sample_size={[*size]}: must be multiples of {factor}, for the {levels} levels of "
      "block_out_channels"
    )
  module = Unet(
    channels=channels,
    depth=depth,
    down=down,
    mid=mid,
    up=up,
    heads=heads,
    blocks=blocks,
    out=c["out_channels"],
    groups=groups,
    eps=c["norm_eps"],
    time={
      "features": channels[0],
      "width": c["time_embedding_dim"] or 4 * channels[0],
      "shift": c["freq_shift"],
      "cosines_first": c["flip_sin_to_cos"],
      "guidance_features": c.get("time_cond_proj_dim"),
    },
    end_time=c["end_time"],
    size_features=c["addition_time_embed_dim"] if pooled else None,
    padding=c["downsample_padding"],
    remat=remat,
    dtype=jnp.dtype(dtype),
  )
  return _of_module(module, (*size, c["in_channels"]), text, pooled, factor)


def _attention(
  c: dict[str, Json], field: str, kinds: dict[str, str], end: str
) -> tuple[str, ...]:
  """Returns the attention of each level from a field that lists block types."""
  by_name = {f"{prefix}{end}": kind for prefix, kind in kinds.items()}
  names, levels = c[field], len(c["block_out_channels"])
  if len(names) != levels or not {*names} <= by_name.keys():
    raise ValueError(
      f"{field}={config_fields.quoted([*names], limit=150)}: must be {levels} of "
      f"{', '.join(by_name)}, one for each of block_out_channels"
    )
  return tuple(by_name[name] for name in names)


def _of_module(
  module: Unet,
  shape: tuple[int, int, int],
  text: int | None,
  pooled: int | None,
  factor: int,
) -> Predictor:
  """Returns the network of a module; `factor` must divide the sides of images."""
  guided, end_time = bool(module.time["guidance_features"]), module.end_time

  def inputs(cond: Cond) -> list[Array | None]:
    names = {"text": text, "distilled_guidance": guided}
    names |= {"pooled": pooled, "time_ids": pooled, "end_time": end_time}
    return [cond[name] if there else None for name, there in names.items()]

  def init(key: PRNGKey) -> Params:
    x = jnp.zeros((1, factor, factor, shape[-1]), module.dtype)
    one = jnp.zeros((1,), jnp.float32)
    cond = {"text": jnp.zeros((1, 1, text or 1)), "distilled_guidance": one}
    cond["end_time"] = one
    cond |= {
      "pooled": jnp.zeros((1, pooled or 1)),
      "time_ids": jnp.zeros((1, TIME_IDS)),
    }
    return module.init(key, x, one, *inputs(cond))["params"]

  def apply(params: Params, x: Array, time: Array, cond: Cond) -> Array:
    if x.shape[1] % factor or x.shape[2] % factor:
      raise ValueError(f"x: {factor} must divide height and width, got {x.shape}")
    out = module.apply({"params": params}, x, time, *inputs(cond or {}))
    return common.to_accumulation_dtype(out)

  options = {"guided": guided, "end_time": end_time, "lists": LISTS}
  if pooled:
    options |= {"conditions": _two_encoders, "sized": True}
  return Predictor(init, apply, shape, text, pooled, **options)


def _two_encoders(texts: Mapping[str, Text]) -> dict[str, Array]:
  """Returns the conditions of Stable Diffusion XL."""
  both = [texts[name] for name in ("text_encoder", "text_encoder_2")]
  rows = jnp.concatenate([text.penultimate for text in both], axis=-1)
  return {"text": rows, "pooled": both[1].projected}
