"""CLIP's text encoder, CLIPTextModel and CLIPTextModelWithProjection of transformers."""

import functools
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from msgspec import Meta

from sdiff_jax.kernels.attention import attention
from sdiff_jax.models.layers import common
from sdiff_jax.models.layers.normalization import LayerNorm
from sdiff_jax.pretrained.diffusers import block_loop
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Channels, Field, Fraction
from sdiff_jax.types import Array, Json, Params, PRNGKey

LISTS = ("encoder.layers",)
VocabularySize = Annotated[int, Meta(ge=1, le=1_000_000)]
Layers = Annotated[int, Meta(ge=1, le=256)]
Length = Annotated[int, Meta(ge=1, le=4096)]  # tokens
Activation = Literal["gelu", "quick_gelu"]
FIELDS = {
  "vocab_size": Field(49408, VocabularySize),
  "hidden_size": Field(512, Channels),
  "intermediate_size": Field(2048, Channels),
  "num_hidden_layers": Field(12, Layers),
  "num_attention_heads": Field(8, Channels),
  "max_position_embeddings": Field(77, Length),
  "hidden_act": Field("quick_gelu", Activation),
  "layer_norm_eps": Field(1e-5, Fraction),
  "projection_dim": Field(512, Channels),
  "eos_token_id": Field(49407, Annotated[int, Meta(ge=0, le=1_000_000)]),
}
SUPPORTED_VALUES = {"model_type": ("clip_text_model",)}
IGNORED_FIELDS = (
  *("architectures", "attention_dropout", "bos_token_id", "dropout", "dtype"),
  *("initializer_factor", "initializer_range", "pad_token_id"),
  *("torch_dtype", "transformers_version"),
)
ACTIVATIONS = {
  "gelu": functools.partial(nn.gelu, approximate=False),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
# Configs from before 2023 all have this wrong end token; the true one is the largest id.
OLD_END = 2


class Text(NamedTuple):
  """Outputs of the encoder for B texts of L tokens.

  Attributes:
    hidden: states after the last norm, [B, L, width].
    pooled: the hidden state at the end token of each text, [B, width]; None for T5.
    penultimate: states before the last block, [B, L, width]; None for T5.
    projected: a linear map of `pooled`, [B, P]; None for an encoder without one.
    mask: which tokens are no padding, bool [B, L]; None if all are attended to.
  """

  hidden: Array
  pooled: Array | None = None
  penultimate: Array | None = None
  projected: Array | None = None
  mask: Array | None = None


class TextEncoder(NamedTuple):
  """A text encoder.

  Attributes:
    init: (key) -> params.
    apply: (params, ids int32 [B, L], mask) -> Text, in float32 or wider; the mask, bool
      [B, L], of tokens that are attended to may be left out, and CLIP has none.
    vocabulary: its size.
    length: largest L; None for any.
    width: of the hidden states.
    padding: id of the token that fills texts up.
    lists: names of its lists of blocks (see `block_loop`).
  """

  init: Callable[[PRNGKey], Params]
  apply: Callable[..., Text]
  vocabulary: int
  length: int | None
  width: int
  padding: int = 0
  lists: tuple[str, ...] = ()


class Block(nn.Module):
  """Pre-norm transformer block, [B, L, C] -> [B, L, C]."""

  heads: int
  hidden: int
  act: str
  eps: float
  dtype: jnp.dtype
  causal: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:
    B, L, C = x.shape
    norm = functools.partial(LayerNorm, epsilon=self.eps, dtype=self.dtype)
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    h = norm(name="layer_norm1")(x)
    q, k, v = (
      dense(C, name=f"self_attn.{n}_proj")(h).reshape(B, L, self.heads, -1)
      for n in "qkv"
    )
    h = attention(q, k, v, causal=self.causal).reshape(x.shape)
    x += dense(C, name="self_attn.out_proj")(h)
    h = dense(self.hidden, name="mlp.fc1")(norm(name="layer_norm2")(x))
    return x + dense(C, name="mlp.fc2")(ACTIVATIONS[self.act](h))


class Encoder(nn.Module):
  """Maps ids [B, L] to hidden states.

  Returns them after the last norm and before the last block, [B, L, width] each, and the
  linear map of `pooled`, if there is one.
  """

  vocabulary: int
  length: int
  width: int
  depth: int
  remat: str
  block: dict[str, Json]
  end: int
  projection: int  # width of a linear map of the pooled state; 0 for none

  @nn.compact
  def __call__(self, ids: Array) -> Text:
    dtype, eps = self.block["dtype"], self.block["eps"]
    embed = functools.partial(nn.Embed, features=self.width, dtype=dtype)
    h = embed(self.vocabulary, name="embeddings.token_embedding")(ids)
    positions = embed(self.length, name="embeddings.position_embedding")
    h += positions(jnp.arange(ids.shape[1]))[None]
    indices = range(self.depth)
    for some in (indices[:-1], indices[-1:]):
      before = h
      (h,) = block_loop.run(
        self, LISTS[0], some, Block, lambda i: self.block, (h,), remat=self.remat
      )
    hidden = LayerNorm(epsilon=eps, dtype=dtype, name="final_layer_norm")(h)
    last = jnp.argmax(ids if self.end == OLD_END else ids == self.end, axis=1)
    pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    if not self.projection:
      return Text(hidden, pooled, before)
    dense = functools.partial(common.Dense, use_bias=False, dtype=dtype)
    projected = dense(self.projection, name="text_projection")(pooled)
    return Text(hidden, pooled, before, projected)


def from_config(
  config: dict[str, Json], *, dtype: str = "float32", remat: str = ""
) -> TextEncoder:
  """Returns the text encoder of a config.json (arXiv:2103.00020, section 2.4).

  See `networks.FromConfig`.
  """
  c = config_fields.validated_config(config, FIELDS, SUPPORTED_VALUES, IGNORED_FIELDS)
  width, heads = c["hidden_size"], c["num_attention_heads"]
  if width % heads:
    raise ValueError(f"num_attention_heads={heads}: must divide hidden_size={width}")
  if c["eos_token_id"] >= c["vocab_size"]:
    raise ValueError(
      f"eos_token_id={c['eos_token_id']}: must be below vocab_size={c['vocab_size']}"
    )
  block = {"heads": heads, "hidden": c["intermediate_size"], "act": c["hidden_act"]}
  block |= {"eps": c["layer_norm_eps"], "dtype": jnp.dtype(dtype)}
  length, depth = c["max_position_embeddings"], c["num_hidden_layers"]
  has_projection = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
  projection = c["projection_dim"] * has_projection
  end, sizes = c["eos_token_id"], (c["vocab_size"], length, width, depth)
  module = Encoder(*sizes, remat, block, end, projection)

  def init(key: PRNGKey) -> Params:
    return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

  def apply(params: Params, ids: Array) -> Text:
    if ids.shape[1] > length:
      raise ValueError(f"ids: texts of {ids.shape[1]} tokens, at most {length} fit")
    text = module.apply({"params": params}, ids)
    return jax.tree.map(common.to_accumulation_dtype, text)

  return TextEncoder(init, apply, c["vocab_size"], length, width, lists=LISTS)
