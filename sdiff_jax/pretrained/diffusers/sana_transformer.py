"""The transformer of SANA, SanaTransformer2DModel of the diffusers format."""

import functools
from collections.abc import Mapping
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from sdiff_jax.models.layers import common
from sdiff_jax.models.layers.normalization import RMSNorm
from sdiff_jax.pretrained.diffusers import adaln_blocks as adaln
from sdiff_jax.pretrained.diffusers import block_loop
from sdiff_jax.pretrained.diffusers import transformer_blocks as blocks
from sdiff_jax.pretrained.diffusers.clip_text import Text
from sdiff_jax.pretrained.diffusers.networks import Predictor
from sdiff_jax.pretrained.diffusers.sana_blocks import GatedConv, linear_attention
from sdiff_jax.pretrained.diffusers.transformer_blocks import Times
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Channels, Field, Positive
from sdiff_jax.types import Array, Cond, Json, Params, PRNGKey

LONG_TEXT = 300  # tokens
LISTS = ("transformer_blocks",)
FIELDS = {
  "in_channels": Field(32, Channels),
  "out_channels": Field(32, Channels | None),
  "num_attention_heads": Field(70, Channels),
  "attention_head_dim": Field(32, Channels),
  "num_layers": Field(20, Annotated[int, Meta(ge=1, le=256)]),
  "num_cross_attention_heads": Field(20, Channels),
  "cross_attention_head_dim": Field(112, Channels),
  "cross_attention_dim": Field(2240, Channels),
  "caption_channels": Field(2304, Channels),
  "mlp_ratio": Field(2.5, Annotated[float, Meta(ge=0.5, le=64)]),
  "attention_bias": Field(False, bool),
  "sample_size": Field(32, Annotated[int, Meta(ge=1, le=1024)]),
  "patch_size": Field(1, Annotated[int, Meta(ge=1, le=16)]),
  "interpolation_scale": Field(None, Positive | None),
  "guidance_embeds": Field(False, bool),
  "guidance_embeds_scale": Field(0.1, Positive),
  "qk_norm": Field(None, str | None),
  "timestep_scale": Field(1.0, Positive),
  "end_time": blocks.FURTHER_INPUTS["end_time"],
}
SUPPORTED_VALUES = {"norm_elementwise_affine": (False,), "norm_eps": (1e-6,)}
IGNORED_FIELDS = ("dropout",)


class LinearAttention(nn.Module):
  """Linear attention of tokens [B, L, C] to themselves."""

  heads: int
  norm: bool
  bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    rows = adaln.heads(self, x, x, self.heads, self.norm, self.bias)
    h = linear_attention(*rows).reshape(x.shape)
    return common.Dense(x.shape[-1], dtype=self.dtype, name="to_out.0")(h)


class Transformer(nn.Module):
  """Predicts from (x [B, H, W, C], times, text [B, M, E], mask [B, M], scale [B])."""

  width: int
  heads: tuple[int, int]  # of the attention to the image, and to the text
  depth: int
  patch: int
  out: int
  ratio: float
  norm: bool
  bias: bool
  base: float | None
  remat: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Array, times: Times, text: Array, mask: Array, guidance: Array | None
  ) -> Array:
    grid = x.shape[1] // self.patch, x.shape[2] // self.patch
    form = {"name": "patch_embed.proj", "dtype": self.dtype, "base": self.base}
    h = adaln.patch_tokens(x, self.width, self.patch, **form)
    start = "emb." if guidance is None else ""
    steer = adaln.Steering(self.width, start, self.dtype, name="time_embed")
    vectors, emb = steer(times, guidance)
    text = adaln.TextProjection(self.width, self.dtype, name="caption_projection")(text)
    text = RMSNorm(self.dtype, adaln.NORM_EPS, name="caption_norm")(text)
    own = functools.partial(
      LinearAttention, self.heads[0], self.norm, self.bias, self.dtype
    )
    feed = functools.partial(GatedConv, self.ratio, self.dtype)
    alike = {"attend": own, "feed": feed, "heads": self.heads[1], "norm": self.norm}
    alike |= {"grid": grid, "dtype": self.dtype}
    (h,) = block_loop.run(
      self,
      LISTS[0],
      range(self.depth),
      adaln.Block,
      lambda i: alike,
      (h,),
      *(text, mask, vectors),
      remat=self.remat,
    )
    output = adaln.Output(self.out * self.patch**2, self.dtype)
    nn.share_scope(self, output)
    return blocks.from_patches(output(h, emb), self.patch, grid[0], channels_last=True)


def from_config(
  config: dict[str, Json], *, dtype: str = "float32", remat: str = ""
) -> Predictor:
  """Returns the network of a config.json (arXiv:2410.10629; Sprint: 2503.09641).

  See `networks.FromConfig`.
  """
  c = config_fields.validated_config(config, FIELDS, SUPPORTED_VALUES, IGNORED_FIELDS)
  _check(c)
  channels, patch, guided = c["in_channels"], c["patch_size"], c["guidance_embeds"]
  scale = c["interpolation_scale"]
  module = Transformer(
    width=c["num_attention_heads"] * c["attention_head_dim"],
    heads=(c["num_attention_heads"], c["num_cross_attention_heads"]),
    depth=c["num_layers"],
    patch=patch,
    out=channels,
    ratio=c["mlp_ratio"],
    norm=c["qk_norm"] is not None,
    bias=c["attention_bias"],
    base=None if scale is None else c["sample_size"] // patch / scale,
    remat=remat,
    dtype=jnp.dtype(dtype),
  )
  width = c["caption_channels"]

  def init(key: PRNGKey) -> Params:
    x = jnp.zeros((1, patch, patch, channels), module.dtype)
    text, one = jnp.zeros((1, 1, width), module.dtype), jnp.zeros((1,), jnp.float32)
    mask, times = jnp.ones((1, 1), bool), blocks.no_times(c)
    return module.init(key, x, times, text, mask, one if guided else None)["params"]

  def apply(params: Params, x: Array, time: Array, cond: Cond) -> Array:
    blocks.check_sides(x, patch)
    cond, guidance = cond or {}, None
    if guided:
      guidance = c["guidance_embeds_scale"] * cond["distilled_guidance"]
    times = blocks.times(c, time, cond)
    times = jax.tree.map(lambda x: x * c["timestep_scale"], times)
    texts = cond["text"], cond["mask"]
    out = module.apply({"params": params}, x, times, *texts, guidance)
    return common.to_accumulation_dtype(out)

  shape = (c["sample_size"], c["sample_size"], channels)
  options = {"patch": patch, "conditions": _conditions, "long_text": LONG_TEXT}
  options |= {"masked": True, "end_time": c["end_time"], "lists": LISTS}
  return Predictor(init, apply, shape, width, guided=guided, **options)


def guided(params: Params) -> Params:
  """Returns parameters under the names that they have in a network with `guidance_embeds`.

  Args:
    params: of a network of SANA; those of other networks stay as they are.

  Example:
    >>> guided({"time_embed": {"emb.timestep_embedder": 1, "linear": 2}})
    {'time_embed': {'timestep_embedder': 1, 'linear': 2}}
  """
  if "time_embed" not in params:
    return params
  embed = {k.removeprefix("emb."): v for k, v in params["time_embed"].items()}
  return params | {"time_embed": embed}


def _conditions(texts: Mapping[str, Text]) -> dict[str, Array]:
  """Returns the first token and the last ones, which leaves an instruction out."""
  text = texts["text_encoder"]
  if text.mask is None:
    raise ValueError("text_encoder: must return a mask")
  rows = {"text": text.hidden, "mask": text.mask}
  if text.hidden.shape[1] <= LONG_TEXT:
    return rows
  kept = np.array([0, *range(1 - LONG_TEXT, 0)])
  return {k: v[:, kept] for k, v in rows.items()}


def _check(c: dict[str, Json]) -> None:
  """Raises a ValueError for fields that contradict each other."""
  width = c["num_attention_heads"] * c["attention_head_dim"]
  cross = c["num_cross_attention_heads"] * c["cross_attention_head_dim"]
  if c["qk_norm"] not in (None, "rms_norm_across_heads"):
    value = config_fields.quoted(c["qk_norm"])
    raise ValueError(f"qk_norm={value}: must be 'rms_norm_across_heads' or null")
  if c["out_channels"] not in (None, c["in_channels"]):
    raise ValueError(
      f"out_channels={c['out_channels']}: must be in_channels={c['in_channels']}, since "
      "the network predicts a value for each of its inputs"
    )
  if c["cross_attention_dim"] != width or cross != width:
    raise ValueError(
      f"cross_attention_dim={c['cross_attention_dim']}: must be attention_head_dim times "
      f"num_attention_heads, {width}, and so must cross_attention_head_dim times "
      "num_cross_attention_heads"
    )
  if c["sample_size"] % c["patch_size"]:
    raise ValueError(
      f"sample_size={c['sample_size']}: must be a multiple of patch_size="
      f"{c['patch_size']}"
    )
  if c["interpolation_scale"] is not None and width % 4:
    raise ValueError(
      f"attention_head_dim={c['attention_head_dim']}: times num_attention_heads must be "
      "a multiple of 4 for interpolation_scale"
    )
