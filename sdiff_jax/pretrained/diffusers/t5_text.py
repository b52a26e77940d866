"""T5's text encoder, T5EncoderModel of the transformers format (arXiv:1910.10683)."""

import functools
import math
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from sdiff_jax.models.layers import common
from sdiff_jax.models.layers.normalization import RMSNorm
from sdiff_jax.pretrained.diffusers import block_loop
from sdiff_jax.pretrained.diffusers.clip_text import Text, TextEncoder
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Channels, Field
from sdiff_jax.types import Array, Json, Params, PRNGKey

LISTS = ("encoder.block",)
Buckets = Annotated[int, Meta(ge=4, le=4096)]
FIELDS = {
  "vocab_size": Field(32128, Annotated[int, Meta(ge=1, le=1_000_000)]),
  "d_model": Field(512, Channels),
  "d_kv": Field(64, Channels),
  "d_ff": Field(2048, Channels),
  "num_layers": Field(6, Annotated[int, Meta(ge=1, le=256)]),
  "num_heads": Field(8, Channels),
  "relative_attention_num_buckets": Field(32, Buckets),
  "relative_attention_max_distance": Field(128, Annotated[int, Meta(ge=8, le=65_536)]),
  "pad_token_id": Field(0, Annotated[int, Meta(ge=0, le=1_000_000)]),
  "feed_forward_proj": Field("relu", Literal["relu", "gated-gelu"]),
}
SUPPORTED_VALUES = {"model_type": ("t5",), "layer_norm_epsilon": (1e-6,)}
IGNORED_FIELDS = (
  *(
    "architectures",
    "dense_act_fn",
    "is_gated_act",
    "dropout_rate",
    "initializer_factor",
  ),
  *("eos_token_id", "decoder_start_token_id", "is_encoder_decoder"),
  *(
    "n_positions",
    "num_decoder_layers",
    "output_past",
    "task_specific_params",
    "dtype",
  ),
  *("tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache"),
  *("classifier_dropout", "is_decoder", "bos_token_id", "scale_decoder_outputs"),
)


def buckets(length: int, count: int, farthest: int) -> np.ndarray:
  """Returns the bucket of the distance of each key from each query, int [L, L].

  Half of the buckets are for keys after the query. Of each half, half are for small
  distances, one each, and the others grow logarithmically up to the farthest.

  Args:
    length: L.
    count: number of buckets.
    farthest: distance from which on all are in the last bucket.

  Example:
    >>> buckets(3, 8, 16).tolist()
    [[0, 5, 6], [1, 0, 5], [2, 1, 0]]
  """
  distance = np.arange(length)[None] - np.arange(length)[:, None]
  half = count // 2
  exact, far = half // 2, np.maximum(abs(distance), 1)
  scale = (half - exact) / math.log(farthest / exact)
  large = exact + (np.log(far / exact) * scale).astype(int)
  near = np.where(abs(distance) < exact, abs(distance), np.minimum(large, half - 1))
  return near + half * (distance > 0)


class Block(nn.Module):
  """Self-attention with a bias of relative positions, and a gated MLP; [B, L, C]."""

  heads: int
  size: int
  hidden: int
  gated: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, bias: Array) -> Array:
    B, L, C = x.shape
    dense = functools.partial(common.Dense, use_bias=False, dtype=self.dtype)
    h = RMSNorm(self.dtype, name="layer.0.layer_norm")(x)
    q, k, v = (
      dense(self.heads * self.size, name=f"layer.0.SelfAttention.{n}")(h).reshape(
        B, L, self.heads, self.size
      )
      for n in "qkv"
    )
    # Without the usual factor size^-0.5, which the weights hold.
    scores = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=bias.dtype)
    weights = jax.nn.softmax(scores + bias).astype(self.dtype)
    h = jnp.einsum("bhlm,bmhd->blhd", weights, v).reshape(B, L, -1)
    x += dense(C, name="layer.0.SelfAttention.o")(h)
    h = RMSNorm(self.dtype, name="layer.1.layer_norm")(x)
    at = "layer.1.DenseReluDense"
    if self.gated:
      first = nn.gelu(dense(self.hidden, name=f"{at}.wi_0")(h), approximate=True)
      h = first * dense(self.hidden, name=f"{at}.wi_1")(h)
    else:
      h = nn.relu(dense(self.hidden, name=f"{at}.wi")(h))
    return x + dense(C, name=f"{at}.wo")(h)


class Encoder(nn.Module):
  """Maps ids [B, L] to hidden states after the last norm, [B, L, width]."""

  vocabulary: int
  width: int
  depth: int
  positions: tuple[int, int]  # number of buckets, and the farthest distance
  block: dict[str, Json]
  remat: str

  @nn.compact
  def __call__(self, ids: Array, mask: Array | None) -> Array:
    dtype, heads = self.block["dtype"], self.block["heads"]
    h = nn.Embed(self.vocabulary, self.width, dtype=dtype, name="shared")(ids)
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    table = nn.Embed(self.positions[0], heads, dtype=dtype, name=name)
    bias = table(jnp.asarray(buckets(ids.shape[1], *self.positions)))
    bias = common.to_accumulation_dtype(jnp.moveaxis(bias, -1, 0))[None]
    if mask is not None:
      bias = jnp.where(mask[:, None, None], bias, jnp.finfo(bias.dtype).min)
    (h,) = block_loop.run(
      self,
      LISTS[0],
      range(self.depth),
      Block,
      lambda i: self.block,
      (h,),
      bias,
      remat=self.remat,
    )
    return RMSNorm(dtype, name="encoder.final_layer_norm")(h)


def from_config(
  config: dict[str, Json], *, dtype: str = "float32", remat: str = ""
) -> TextEncoder:
  """Returns the text encoder of a config.json.

  See `networks.FromConfig`.
  """
  c = config_fields.validated_config(config, FIELDS, SUPPORTED_VALUES, IGNORED_FIELDS)
  block = {"heads": c["num_heads"], "size": c["d_kv"], "hidden": c["d_ff"]}
  block |= {"gated": c["feed_forward_proj"] != "relu", "dtype": jnp.dtype(dtype)}
  positions = c["relative_attention_num_buckets"], c["relative_attention_max_distance"]
  if positions[1] <= positions[0] // 4:
    raise ValueError(
      f"relative_attention_max_distance={positions[1]}: must be above "
      f"{positions[0] // 4}, a fourth of relative_attention_num_buckets"
    )
  width, depth = c["d_model"], c["num_layers"]
  module = Encoder(c["vocab_size"], width, depth, positions, block, remat)

  def init(key: PRNGKey) -> Params:
    return module.init(key, jnp.zeros((1, 1), jnp.int32), None)["params"]

  def apply(params: Params, ids: Array, mask: Array | None = None) -> Text:
    hidden = common.to_accumulation_dtype(module.apply({"params": params}, ids, mask))
    return Text(hidden, mask=mask)

  sizes = c["vocab_size"], None, width
  return TextEncoder(init, apply, *sizes, c["pad_token_id"], LISTS)
