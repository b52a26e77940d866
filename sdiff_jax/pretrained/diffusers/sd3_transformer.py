"""The transformer of Stable Diffusion 3, SD3Transformer2DModel of the diffusers format."""

from collections.abc import Mapping
from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
from msgspec import Meta

from sdiff_jax.models.layers import common
from sdiff_jax.pretrained.diffusers import block_loop
from sdiff_jax.pretrained.diffusers import transformer_blocks as blocks
from sdiff_jax.pretrained.diffusers.clip_text import Text
from sdiff_jax.pretrained.diffusers.networks import Predictor
from sdiff_jax.pretrained.diffusers.transformer_blocks import Times
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Channels, Field
from sdiff_jax.types import Array, Cond, Json, Params, PRNGKey

LONG_TEXT = 256  # tokens of T5's encoder
LISTS = ("transformer_blocks",)
Depth = Annotated[int, Meta(ge=1, le=256)]
Side = Annotated[int, Meta(ge=1, le=1024)]
Indices = Annotated[list[Annotated[int, Meta(ge=0, le=255)]], Meta(max_length=256)]
FIELDS = {
  "sample_size": Field(128, Side),
  "patch_size": Field(2, Annotated[int, Meta(ge=1, le=16)]),
  "in_channels": Field(16, Channels),
  "num_layers": Field(18, Depth),
  "attention_head_dim": Field(64, Channels),
  "num_attention_heads": Field(18, Channels),
  "joint_attention_dim": Field(4096, Channels),
  "caption_projection_dim": Field(1152, Channels),
  "pooled_projection_dim": Field(2048, Channels),
  "out_channels": Field(16, Channels | None),
  "pos_embed_max_size": Field(96, Side),
  "dual_attention_layers": Field((), Indices),
  "qk_norm": Field(None, str | None),
  **blocks.FURTHER_INPUTS,
}


class Transformer(nn.Module):
  """Predicts from (x [B, H, W, C], times, text [B, M, E], pooled [B, P])."""

  width: int
  heads: int
  depth: int
  patch: int
  out: int
  grid: int
  base: int
  norm: bool
  dual: tuple[int, ...]
  remat: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, times: Times, text: Array, pooled: Array) -> Array:
    size, rows = (self.patch, self.patch), x.shape[1] // self.patch
    options = {"strides": size, "padding": "VALID", "dtype": self.dtype}
    conv = common.Conv(self.width, size, name="pos_embed.proj", **options)
    h = conv(x.astype(self.dtype))
    h = (h + self._positions(*h.shape[1:3])[None]).reshape(len(x), -1, self.width)
    emb = blocks.Embedding(self.width, self.dtype, name="time_text_embed")
    emb = emb(times, pooled, None)
    dense = common.Dense(self.width, dtype=self.dtype, name="context_embedder")
    text = dense(text.astype(self.dtype))
    alike = {"heads": self.heads, "norm": self.norm, "dtype": self.dtype}
    h, text = block_loop.run(
      self,
      LISTS[0],
      range(self.depth),
      blocks.JointBlock,
      lambda i: alike | {"last": i == self.depth - 1, "dual": i in self.dual},
      (h, text),
      emb,
      remat=self.remat,
    )
    output = blocks.Output(self.out * self.patch**2, self.dtype)
    nn.share_scope(self, output)
    return blocks.from_patches(output(h, emb), self.patch, rows, channels_last=True)

  def _positions(self, rows: int, columns: int) -> Array:
    """Returns the middle of the positions of the largest grid, [rows, columns, C]."""
    grid = self.grid

    def init(key: PRNGKey, shape: tuple[int, ...]) -> Array:
      values = blocks.sincos(self.width, grid, grid, self.base)
      return jnp.asarray(values.T[..., None], jnp.float32)

    table = self.param("pos_embed.pos_embed", init, (self.width, grid**2, 1))
    table = table.astype(self.dtype).T.reshape(grid, grid, self.width)
    top, left = (grid - rows) // 2, (grid - columns) // 2
    return table[top : top + rows, left : left + columns]


def from_config(
  config: dict[str, Json], *, dtype: str = "float32", remat: str = ""
) -> Predictor:
  """Returns the network of a config.json (arXiv:2403.03206; 3.5 has dual attention).

  See `networks.FromConfig`.
  """
  c = config_fields.validated_config(config, FIELDS, {})
  width, patch = c["attention_head_dim"] * c["num_attention_heads"], c["patch_size"]
  channels, grid = c["in_channels"], c["pos_embed_max_size"]
  _check(c, width)
  module = Transformer(
    width=width,
    heads=c["num_attention_heads"],
    depth=c["num_layers"],
    patch=patch,
    out=channels,
    grid=grid,
    base=c["sample_size"] // patch,
    norm=c["qk_norm"] is not None,
    dual=tuple(c["dual_attention_layers"]),
    remat=remat,
    dtype=jnp.dtype(dtype),
  )

  def init(key: PRNGKey) -> Params:
    x = jnp.zeros((1, patch, patch, channels), module.dtype)
    text = jnp.zeros((1, 1, c["joint_attention_dim"]), module.dtype)
    pooled = jnp.zeros((1, c["pooled_projection_dim"]), module.dtype)
    return module.init(key, x, blocks.no_times(c), text, pooled)["params"]

  def apply(params: Params, x: Array, time: Array, cond: Cond) -> Array:
    blocks.check_sides(x, patch)
    if max(x.shape[1:3]) > grid * patch:
      raise ValueError(f"x: sides are at most {grid * patch}, got {x.shape}")
    cond, times = cond or {}, blocks.times(c, time, cond)
    out = module.apply({"params": params}, x, times, cond["text"], cond["pooled"])
    return common.to_accumulation_dtype(out)

  shape = (c["sample_size"], c["sample_size"], channels)
  pooled = c["pooled_projection_dim"]
  width = c["joint_attention_dim"]

  def conditions(texts: Mapping[str, Text]) -> dict[str, Array]:
    clips = [texts[name] for name in ("text_encoder", "text_encoder_2")]
    clip = jnp.concatenate([text.penultimate for text in clips], axis=-1)
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, max(width - clip.shape[-1], 0))))
    # The third encoder may be left out (arXiv:2403.03206, section 5.3.3).
    zeros = jnp.zeros((len(clip), LONG_TEXT, width), clip.dtype)
    long = texts["text_encoder_3"].hidden if "text_encoder_3" in texts else zeros
    pooled = jnp.concatenate([text.projected for text in clips], axis=-1)
    return {"text": jnp.concatenate([clip, long], axis=1), "pooled": pooled}

  options = {"patch": patch, "conditions": conditions, "long_text": LONG_TEXT}
  options |= {"lists": LISTS}
  options |= {"guided": c["guidance_proj"], "end_time": c["end_time"]}
  return Predictor(init, apply, shape, width, pooled, **options)


def _check(c: dict[str, Json], width: int) -> None:
  """Raises a ValueError for fields that contradict each other."""
  if c["qk_norm"] not in (None, "rms_norm"):
    value = config_fields.quoted(c["qk_norm"])
    raise ValueError(f"qk_norm={value}: must be 'rms_norm' or null")
  if c["out_channels"] not in (None, c["in_channels"]):
    raise ValueError(
      f"out_channels={c['out_channels']}: must be in_channels={c['in_channels']}, since "
      "the network predicts a value for each of its inputs"
    )
  if c["caption_projection_dim"] != width or width % 4:
    raise ValueError(
      f"caption_projection_dim={c['caption_projection_dim']}: must be attention_head_dim "
      f"times num_attention_heads, {width}, and a multiple of 4"
    )
  largest = c["pos_embed_max_size"] * c["patch_size"]
  if c["sample_size"] % c["patch_size"] or c["sample_size"] > largest:
    raise ValueError(
      f"sample_size={c['sample_size']}: must be a multiple of patch_size="
      f"{c['patch_size']}, and at most {largest} for pos_embed_max_size"
    )
