"""The transformer of Flux, FluxTransformer2DModel of the diffusers format.

Its tokens are patches of 2 x 2 latents, which it makes itself.
"""

import functools
from collections.abc import Mapping
from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from sdiff_jax.models.layers import common
from sdiff_jax.pretrained.diffusers import block_loop
from sdiff_jax.pretrained.diffusers import transformer_blocks as blocks
from sdiff_jax.pretrained.diffusers.clip_text import Text
from sdiff_jax.pretrained.diffusers.networks import Predictor
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Channels, Field
from sdiff_jax.types import Array, Cond, Json, Params, PRNGKey

PATCH = 2
LISTS = ("transformer_blocks", "single_transformer_blocks")
LONG_TEXT = 512  # tokens of T5's encoder
SIDE = 128  # of the latents of an image, which the config does not tell
THETA = 10_000.0  # of the rotary positions
Depth = Annotated[int, Meta(ge=0, le=256)]
Axis = Annotated[int, Meta(ge=2, le=1024)]
Axes = Annotated[list[Axis], Meta(min_length=3, max_length=3)]
FIELDS = {
  "in_channels": Field(64, Channels),
  "out_channels": Field(None, Channels | None),
  "num_layers": Field(19, Depth),
  "num_single_layers": Field(38, Depth),
  "attention_head_dim": Field(128, Channels),
  "num_attention_heads": Field(24, Channels),
  "joint_attention_dim": Field(4096, Channels),
  "pooled_projection_dim": Field(768, Channels),
  "guidance_embeds": Field(False, bool),
  "axes_dims_rope": Field((16, 56, 56), Axes),
}
SUPPORTED_VALUES = {"patch_size": (1,)}


class Transformer(nn.Module):
  """Predicts from (x [B, H, W, C], time [B], text [B, M, E], pooled [B, P], scale [B])."""

  width: int
  heads: int
  depth: int
  single_depth: int
  out: int
  axes: tuple[int, ...]
  remat: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Array, time: Array, text: Array, pooled: Array, guidance: Array | None
  ) -> Array:
    rows, columns = x.shape[1] // PATCH, x.shape[2] // PATCH

    def dense(name: str, h: Array) -> Array:
      return common.Dense(self.width, dtype=self.dtype, name=name)(h.astype(self.dtype))

    h = dense("x_embedder", blocks.patches(x, PATCH))
    emb = blocks.Embedding(self.width, self.dtype, name="time_text_embed")
    emb = emb((time, None, None), pooled, guidance)
    text = dense("context_embedder", text)
    rotation = _rotation(self.axes, rows, columns, 0)
    run = functools.partial(block_loop.run, self, remat=self.remat)
    alike = {"heads": self.heads, "dtype": self.dtype}
    joint = alike | {"norm": True, "last": False, "dual": False}
    h, text = run(
      LISTS[0],
      range(self.depth),
      blocks.JointBlock,
      lambda i: joint,
      (h, text),
      *(emb, rotation),
    )
    length = text.shape[1]
    both = jnp.concatenate([text, h], axis=1)
    rotation = _rotation(self.axes, rows, columns, length)
    (both,) = run(
      LISTS[1],
      range(self.single_depth),
      blocks.SingleBlock,
      lambda i: alike,
      (both,),
      *(emb, rotation),
    )
    output = blocks.Output(self.out * PATCH**2, self.dtype)
    nn.share_scope(self, output)
    tokens = output(both[:, length:], emb)
    return blocks.from_patches(tokens, PATCH, rows, channels_last=False)


def _rotation(
  axes: tuple[int, ...], rows: int, columns: int, length: int
) -> blocks.Rotation:
  """Returns the rotation of a text of some length, which is none, and of an image.

  The positions of an image token are (0, row, column), each with some of the channels.
  """
  at = np.zeros((rows, columns, len(axes)))
  at[..., 1] = np.arange(rows)[:, None]
  at[..., 2] = np.arange(columns)[None]
  at = np.concatenate([np.zeros((length, len(axes))), at.reshape(-1, len(axes))])
  angles = [
    at[:, i : i + 1] * THETA ** -(np.arange(0, size, 2) / size)
    for i, size in enumerate(axes)
  ]
  whole = np.concatenate(angles, axis=1)
  cos, sin = np.cos(whole), np.sin(whole)
  return jnp.asarray(cos, jnp.float32), jnp.asarray(sin, jnp.float32)


def from_config(
  config: dict[str, Json], *, dtype: str = "float32", remat: str = ""
) -> Predictor:
  """Returns the network of a config.json (https://github.com/black-forest-labs/flux).

  See `networks.FromConfig`.
  """
  c = config_fields.validated_config(config, FIELDS, SUPPORTED_VALUES)
  axes, size = tuple(c["axes_dims_rope"]), c["attention_head_dim"]
  if sum(axes) != size or any(n % 2 for n in axes):
    raise ValueError(
      f"axes_dims_rope={[*axes]}: must be even, and their sum attention_head_dim={size}"
    )
  inputs = c["in_channels"]
  if inputs % PATCH**2 or c["out_channels"] not in (None, inputs):
    raise ValueError(
      f"in_channels={inputs}: must be a multiple of {PATCH**2}, and out_channels the same"
    )
  channels, guided = inputs // PATCH**2, c["guidance_embeds"]
  module = Transformer(
    width=size * c["num_attention_heads"],
    heads=c["num_attention_heads"],
    depth=c["num_layers"],
    single_depth=c["num_single_layers"],
    out=channels,
    axes=axes,
    remat=remat,
    dtype=jnp.dtype(dtype),
  )

  def init(key: PRNGKey) -> Params:
    x = jnp.zeros((1, PATCH, PATCH, channels), module.dtype)
    text = jnp.zeros((1, 1, c["joint_attention_dim"]), module.dtype)
    pooled = jnp.zeros((1, c["pooled_projection_dim"]), module.dtype)
    one = jnp.zeros((1,), jnp.float32)
    scale = one if guided else None
    return module.init(key, x, one, text, pooled, scale)["params"]

  def apply(params: Params, x: Array, time: Array, cond: Cond) -> Array:
    blocks.check_sides(x, PATCH)
    cond = cond or {}
    scale = cond["distilled_guidance"] if guided else None
    variables = {"params": params}
    out = module.apply(variables, x, time, cond["text"], cond["pooled"], scale)
    return common.to_accumulation_dtype(out)

  shape, text = (SIDE, SIDE, channels), c["joint_attention_dim"]
  pooled = c["pooled_projection_dim"]

  def conditions(texts: Mapping[str, Text]) -> dict[str, Array]:
    pooled, long = texts["text_encoder"].pooled, texts["text_encoder_2"].hidden
    return {"text": long, "pooled": pooled}

  options = {"conditions": conditions, "long_text": LONG_TEXT, "spacing": "trailing"}
  options |= {"lists": LISTS}
  return Predictor(init, apply, shape, text, pooled, guided, PATCH, **options)
