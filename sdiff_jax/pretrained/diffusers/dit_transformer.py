"""The transformer of DiT, DiTTransformer2DModel of the diffusers format.

It is conditioned on a class. Its published config files call it Transformer2DModel.
"""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
from msgspec import Meta

from sdiff_jax.models.layers import common
from sdiff_jax.pretrained.diffusers import block_loop
from sdiff_jax.pretrained.diffusers import transformer_blocks as blocks
from sdiff_jax.pretrained.diffusers.networks import Predictor
from sdiff_jax.pretrained.diffusers.transformer_blocks import Times
from sdiff_jax.pretrained.diffusers.unet import Time
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Channels, Field, Fraction
from sdiff_jax.types import Array, Cond, Json, Params, PRNGKey

LISTS = ("transformer_blocks",)
NAMES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second until 2024
FREQUENCY_SHIFT = 1.0  # of the embedded times; 0 in the files of DiT's authors
Depth = Annotated[int, Meta(ge=1, le=256)]
Side = Annotated[int, Meta(ge=1, le=1024)]
FIELDS = {
  "num_attention_heads": Field(16, Channels),
  "attention_head_dim": Field(72, Channels),
  "in_channels": Field(4, Channels),
  "out_channels": Field(None, Channels | None),
  "num_layers": Field(28, Depth),
  "sample_size": Field(32, Side),
  "patch_size": Field(2, Annotated[int, Meta(ge=1, le=16)]),
  "num_embeds_ada_norm": Field(1000, Annotated[int, Meta(ge=1, le=1_000_000)]),
  "norm_eps": Field(1e-5, Fraction),
  **blocks.FURTHER_INPUTS,
}
UNSUPPORTED_FIELDS = (None, False)
SUPPORTED_VALUES = {
  "norm_type": ("ada_norm_zero",),
  "activation_fn": ("gelu-approximate",),
  "attention_bias": (True,),
  "norm_elementwise_affine": (False,),
  "attention_type": ("default",),
  **{
    name: UNSUPPORTED_FIELDS
    for name in (
      *("caption_channels", "cross_attention_dim", "double_self_attention"),
      *("num_vector_embeds", "only_cross_attention"),
    )
  },
}
# There is no dropout in sampling, scores are always float32, and a linear layer is the
# same as a 1x1 convolution. DiT has no group norm.
IGNORED_FIELDS = ("dropout", "norm_num_groups", "upcast_attention")
IGNORED_FIELDS += ("use_linear_projection",)


class Embedding(nn.Module):
  """Embeds `times` and class [B], negative for no class; [B, width]."""

  width: int
  classes: int
  shift: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, times: Times, label: Array) -> Array:
    waves = Time(
      blocks.TIME_FEATURES,
      self.width,
      self.shift,
      cosines_first=True,
      dtype=self.dtype,
      name="timestep_embedder",
    )
    table = nn.Embed(
      self.classes + 1,
      self.width,
      dtype=self.dtype,
      name="class_embedder.embedding_table",
    )
    return waves(*times) + table(jnp.where(label < 0, self.classes, label))


class Block(nn.Module):
  """A block of tokens [B, L, C] with an embedding of its own.

  It returns the first block's embedding [B, C] too, which the output layer takes.
  """

  heads: int
  classes: int
  shift: float
  eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Array, first: Array | None, times: Times, label: Array
  ) -> tuple[Array, Array]:
    embed = Embedding(
      x.shape[-1], self.classes, self.shift, self.dtype, name="norm1.emb"
    )
    emb = embed(times, label)
    shift, scale, gate, *mlp = blocks.modulation(emb, 6, self.dtype, "norm1")
    attend = blocks.TokenAttention(self.heads, False, self.dtype, name="attn1")
    x += gate * attend(blocks.modulated(x, shift, scale))[0]
    shift, scale, gate = mlp
    h = blocks.modulated(x, shift, scale, self.eps)
    x += gate * blocks.FeedForward(self.dtype, name="ff")(h)
    return x, emb if first is None else first


class Transformer(nn.Module):
  """Predicts from (x [B, H, W, C], times, label [B])."""

  width: int
  heads: int
  depth: int
  patch: int
  out: int
  classes: int
  base: int
  shift: float
  eps: float
  remat: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, times: Times, label: Array) -> Array:
    size, rows = (self.patch, self.patch), x.shape[1] // self.patch
    options = {"strides": size, "padding": "VALID", "dtype": self.dtype}
    conv = common.Conv(self.width, size, name="pos_embed.proj", **options)
    h = conv(x.astype(self.dtype))
    at = blocks.sincos(self.width, *h.shape[1:3], self.base)
    h = h.reshape(len(x), -1, self.width) + jnp.asarray(at, self.dtype)[None]
    alike = {"heads": self.heads, "classes": self.classes, "shift": self.shift}
    alike |= {"eps": self.eps, "dtype": self.dtype}
    carry: block_loop.Carry = (h, None)
    # A loop carries what the first block, which stands before it, has made.
    for indices in (range(1), range(1, self.depth)):
      carry = block_loop.run(
        self,
        LISTS[0],
        indices,
        Block,
        lambda i: alike,
        carry,
        *(times, label),
        remat=self.remat,
      )
    h, first = carry
    dense = common.Dense(2 * self.width, dtype=self.dtype, name="proj_out_1")
    shift, scale = jnp.split(dense(nn.silu(first))[:, None], 2, axis=-1)
    h = blocks.modulated(h, shift, scale)
    h = common.Dense(self.out * self.patch**2, dtype=self.dtype, name="proj_out_2")(h)
    return blocks.from_patches(h, self.patch, rows, channels_last=True)


def from_config(
  config: dict[str, Json], *, dtype: str = "float32", remat: str = ""
) -> Predictor:
  """Returns the network of a config.json (arXiv:2212.09748).

  If it predicts variances beside the noise, they are left out.

  See `networks.FromConfig`.
  """
  c = config_fields.validated_config(config, FIELDS, SUPPORTED_VALUES, IGNORED_FIELDS)
  return predictor(c, FREQUENCY_SHIFT, dtype=dtype, remat=remat)


def predictor(
  c: dict[str, Json], shift: float, *, dtype: str = "float32", remat: str = ""
) -> Predictor:
  """Returns the network of the fields of a config.

  Args:
    c: values of FIELDS.
    shift: of the frequencies of the embedded times.
    dtype: see `networks.FromConfig`.
    remat: see `networks.FromConfig`.

  Raises:
    ValueError: sizes that do not fit.
  """
  width, patch = c["attention_head_dim"] * c["num_attention_heads"], c["patch_size"]
  channels, side = c["in_channels"], c["sample_size"]
  out = c["out_channels"] or channels
  if width % 4:
    raise ValueError(
      f"attention_head_dim={c['attention_head_dim']}: must make with num_attention_heads="
      f"{c['num_attention_heads']} a multiple of 4"
    )
  if side % patch:
    raise ValueError(f"sample_size={side}: must be a multiple of patch_size={patch}")
  if out not in (channels, 2 * channels):
    raise ValueError(
      f"out_channels={out}: must be in_channels={channels}, or twice as many with "
      "variances"
    )
  module = Transformer(
    width=width,
    heads=c["num_attention_heads"],
    depth=c["num_layers"],
    patch=patch,
    out=out,
    classes=c["num_embeds_ada_norm"],
    base=side // patch,
    shift=shift,
    eps=c["norm_eps"],
    remat=remat,
    dtype=jnp.dtype(dtype),
  )

  def init(key: PRNGKey) -> Params:
    x = jnp.zeros((1, patch, patch, channels), module.dtype)
    times, label = blocks.no_times(c), jnp.zeros((1,), jnp.int32)
    return module.init(key, x, times, label)["params"]

  def apply(params: Params, x: Array, time: Array, cond: Cond) -> Array:
    blocks.check_sides(x, patch)
    times, label = blocks.times(c, time, cond), (cond or {})["label"]
    out = module.apply({"params": params}, x, times, label)
    return common.to_accumulation_dtype(out)[..., :channels]

  classes = c["num_embeds_ada_norm"]
  shape = (side, side, channels)
  options = {"guided": c["guidance_proj"], "end_time": c["end_time"]}
  options |= {"lists": LISTS, "patch": patch, "classes": classes}
  return Predictor(init, apply, shape, None, **options)
