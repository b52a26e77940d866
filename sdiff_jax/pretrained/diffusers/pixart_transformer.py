"""The transformer of PixArt, PixArtTransformer2DModel of the diffusers format.

Published config files call it Transformer2DModel, with norm_type="ada_norm_single".
"""

import functools
from collections.abc import Mapping
from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
from msgspec import Meta

from sdiff_jax.models.layers import common
from sdiff_jax.pretrained.diffusers import adaln_blocks as adaln
from sdiff_jax.pretrained.diffusers import block_loop
from sdiff_jax.pretrained.diffusers import transformer_blocks as blocks
from sdiff_jax.pretrained.diffusers.clip_text import Text
from sdiff_jax.pretrained.diffusers.networks import TIME_IDS, Predictor
from sdiff_jax.pretrained.diffusers.transformer_blocks import Times
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Channels, Field, Positive
from sdiff_jax.types import Array, Cond, Json, Params, PRNGKey

LISTS = ("transformer_blocks",)
NORM_TYPE = "ada_norm_single"
# Tokens of T5's encoder, for a network that is told the size of the image and one that is
# not: alpha at 1024 pixels, and sigma.
LONG_TEXTS = {True: 120, False: 300}
SIZED = 128  # sample_size of networks that are told it, unless the config says so
UNIT = 64  # rows of latents that the positions are made for
FIELDS = {
  "num_attention_heads": Field(16, Channels),
  "attention_head_dim": Field(72, Channels),
  "in_channels": Field(4, Channels),
  "out_channels": Field(8, Channels | None),
  "num_layers": Field(28, Annotated[int, Meta(ge=1, le=256)]),
  "cross_attention_dim": Field(1152, Channels),
  "sample_size": Field(128, Annotated[int, Meta(ge=1, le=1024)]),
  "patch_size": Field(2, Annotated[int, Meta(ge=1, le=16)]),
  "interpolation_scale": Field(None, Positive | None),
  "use_additional_conditions": Field(None, bool | None),
  "caption_channels": Field(None, Channels),
  **blocks.FURTHER_INPUTS,
}
UNSUPPORTED_FIELDS = (None, False)
SUPPORTED_VALUES = {
  "norm_type": (NORM_TYPE,),
  "activation_fn": ("gelu-approximate",),
  "attention_bias": (True,),
  "norm_elementwise_affine": (False,),
  "norm_eps": (1e-6,),
  "attention_type": ("default",),
  **{
    name: UNSUPPORTED_FIELDS
    for name in ("double_self_attention", "num_vector_embeds", "only_cross_attention")
  },
}
IGNORED_FIELDS = ("dropout", "norm_num_groups", "num_embeds_ada_norm")
IGNORED_FIELDS += ("upcast_attention", "use_linear_projection")


class Transformer(nn.Module):
  """Predicts from (x [B, H, W, C], times, text [B, M, E], mask [B, M], sizes [B, 2])."""

  width: int
  heads: int
  depth: int
  patch: int
  out: int
  base: float
  remat: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Array, times: Times, text: Array, mask: Array, sizes: Array | None
  ) -> Array:
    grid = x.shape[1] // self.patch, x.shape[2] // self.patch
    form = {"name": "pos_embed.proj", "dtype": self.dtype, "base": self.base}
    h = adaln.patch_tokens(x, self.width, self.patch, **form)
    steer = adaln.Steering(self.width, "emb.", self.dtype, name="adaln_single")
    vectors, emb = steer(times, sizes=sizes)
    text = adaln.TextProjection(self.width, self.dtype, name="caption_projection")(text)
    own = functools.partial(adaln.MaskedAttention, self.heads, False, self.dtype)
    feed = functools.partial(blocks.FeedForward, self.dtype)
    alike = {"attend": own, "feed": feed, "heads": self.heads, "norm": False}
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
  """Returns the network of a config.json (arXiv:2310.00426; sigma: 2403.04692).

  If it predicts variances beside the noise, they are left out.

  See `networks.FromConfig`.
  """
  c = config_fields.validated_config(
    config, FIELDS, SUPPORTED_VALUES, IGNORED_FIELDS, required=("caption_channels",)
  )
  channels, patch, side = c["in_channels"], c["patch_size"], c["sample_size"]
  sized = c["use_additional_conditions"]
  sized = side == SIZED if sized is None else sized
  _check(c, sized)
  module = Transformer(
    width=c["num_attention_heads"] * c["attention_head_dim"],
    heads=c["num_attention_heads"],
    depth=c["num_layers"],
    patch=patch,
    out=c["out_channels"] or channels,
    base=side // patch / (c["interpolation_scale"] or max(side // UNIT, 1)),
    remat=remat,
    dtype=jnp.dtype(dtype),
  )
  width = c["caption_channels"]

  def init(key: PRNGKey) -> Params:
    x = jnp.zeros((1, patch, patch, channels), module.dtype)
    text, times = jnp.zeros((1, 1, width), module.dtype), blocks.no_times(c)
    mask, sizes = jnp.ones((1, 1), bool), jnp.ones((1, 2)) if sized else None
    return module.init(key, x, times, text, mask, sizes)["params"]

  def apply(params: Params, x: Array, time: Array, cond: Cond) -> Array:
    blocks.check_sides(x, patch)
    cond, times = cond or {}, blocks.times(c, time, cond)
    sizes = cond["time_ids"][:, TIME_IDS - 2 :] if sized else None
    texts = cond["text"], cond["mask"]
    out = module.apply({"params": params}, x, times, *texts, sizes)
    return common.to_accumulation_dtype(out[..., :channels])

  options = {"patch": patch, "conditions": _conditions, "long_text": LONG_TEXTS[sized]}
  options |= {"masked": True, "sized": sized, "lists": LISTS}
  options |= {"guided": c["guidance_proj"], "end_time": c["end_time"]}
  return Predictor(init, apply, (side, side, channels), width, **options)


def _conditions(texts: Mapping[str, Text]) -> dict[str, Array]:
  """Returns the hidden states of the text and its mask."""
  text = texts["text_encoder"]
  if text.mask is None:
    raise ValueError("text_encoder: must return a mask")
  return {"text": text.hidden, "mask": text.mask}


def _check(c: dict[str, Json], sized: bool) -> None:
  """Raises a ValueError for fields that contradict each other."""
  width = c["num_attention_heads"] * c["attention_head_dim"]
  if c["out_channels"] not in (None, c["in_channels"], 2 * c["in_channels"]):
    raise ValueError(
      f"out_channels={c['out_channels']}: must be in_channels={c['in_channels']}, or "
      "twice as many with variances"
    )
  if c["cross_attention_dim"] != width:
    raise ValueError(
      f"cross_attention_dim={c['cross_attention_dim']}: must be attention_head_dim times "
      f"num_attention_heads, {width}"
    )
  if width % 4 or (sized and width % 3):
    raise ValueError(
      f"attention_head_dim={c['attention_head_dim']}: times num_attention_heads must be a "
      "multiple of 4, and of 3 for a network that is told the size of the image"
    )
  if c["sample_size"] % c["patch_size"]:
    raise ValueError(
      f"sample_size={c['sample_size']}: must be a multiple of patch_size="
      f"{c['patch_size']}"
    )
