"""Gemma 2 as a text encoder, Gemma2Model of the transformers format."""

import functools
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from sdiff_jax.models.layers import common
from sdiff_jax.pretrained.diffusers import block_loop
from sdiff_jax.pretrained.diffusers.clip_text import Text, TextEncoder
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Channels, Field, Positive
from sdiff_jax.types import Array, Json, Params, PRNGKey

Count = Annotated[int, Meta(ge=1, le=1_000_000)]
LISTS = ("layers",)
THETA = 10_000.0  # of the rotary positions
FIELDS = {
  "vocab_size": Field(256_000, Count),
  "hidden_size": Field(2304, Channels),
  "intermediate_size": Field(9216, Channels),
  "num_hidden_layers": Field(26, Annotated[int, Meta(ge=1, le=256)]),
  "num_attention_heads": Field(8, Channels),
  "num_key_value_heads": Field(4, Channels),
  "head_dim": Field(256, Channels),
  "query_pre_attn_scalar": Field(256, Positive),
  "attn_logit_softcapping": Field(50.0, Positive | None),
  "sliding_window": Field(4096, Count | None),
  "max_position_embeddings": Field(8192, Count),
  "pad_token_id": Field(0, Annotated[int, Meta(ge=0, le=1_000_000)]),
}
SUPPORTED_VALUES = {
  "model_type": ("gemma2",),
  "hidden_activation": ("gelu_pytorch_tanh",),
  "hidden_act": ("gelu_pytorch_tanh",),
  "rms_norm_eps": (1e-6,),
  "rope_theta": (THETA,),
  "rope_parameters": (None, {"rope_theta": THETA, "rope_type": "default"}),
  "attention_bias": (False,),
  "use_bidirectional_attention": (None, False),
}
IGNORED_FIELDS = (
  *("architectures", "attention_dropout", "bos_token_id", "cache_implementation"),
  *("dtype", "eos_token_id", "final_logit_softcapping", "initializer_range"),
  *("layer_types", "tie_word_embeddings", "torch_dtype", "transformers_version"),
  "use_cache",
)


class Norm(nn.Module):
  """x / sqrt(mean(x^2) + 1e-6) times one plus a scale."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    w = common.rms_norm(common.to_accumulation_dtype(x))
    scale = self.param("scale", nn.initializers.zeros, x.shape[-1:]).astype(w.dtype)
    return (w * (1 + scale)[None, None]).astype(self.dtype)


def rotate_halves(x: Array) -> Array:
  """Returns x [B, L, heads, size], its halves rotated by angles that grow with position.

  Unlike `transformer_blocks.rotate`, it pairs channel i with channel i + size / 2.

  Args:
    x: queries or keys.

  Example:
    >>> rotate_halves(jnp.ones((1, 2, 1, 2)))[0, 0].tolist()  # position 0
    [[1.0, 1.0]]
  """
  length, size = x.shape[1], x.shape[-1]
  angles = np.arange(length)[:, None] * THETA ** -(np.arange(0, size, 2) / size)
  w = common.to_accumulation_dtype(x)
  cos, sin = (jnp.asarray(f(angles), w.dtype)[None, :, None] for f in (np.cos, np.sin))
  a, b = jnp.split(w, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(
    x.dtype
  )


class Attention(nn.Module):
  """Causal attention of [B, L, C], with fewer keys than queries and bounded scores."""

  heads: int
  groups: int  # of heads that share keys and values
  size: int
  scale: float
  cap: float | None
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, mask: Array | None) -> Array:
    dense = functools.partial(common.Dense, use_bias=False, dtype=self.dtype)

    def rows(name: str, count: int) -> Array:
      h = dense(count * self.size, name=name)(x)
      return h.reshape(*x.shape[:2], count, self.size)

    q = rotate_halves(rows("q_proj", self.heads))
    k, v = rotate_halves(rows("k_proj", self.groups)), rows("v_proj", self.groups)
    k, v = (a.repeat(self.heads // self.groups, 2) for a in (k, v))
    wide = common.to_accumulation_dtype(x).dtype
    scores = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=wide)
    scores *= self.scale
    if self.cap is not None:
      scores = self.cap * jnp.tanh(scores / self.cap)
    keep = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    if mask is not None:
      keep = keep & mask[:, None, None]
    weights = jax.nn.softmax(jnp.where(keep, scores, jnp.finfo(wide).min))
    h = jnp.einsum("bhlm,bmhd->blhd", weights.astype(self.dtype), v)
    return dense(x.shape[-1], name="o_proj")(h.reshape(*x.shape[:2], -1))


class Block(nn.Module):
  """Attention and a gated MLP, each between two norms; [B, L, C]."""

  attention: dict[str, Json]
  hidden: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, mask: Array | None) -> Array:
    norm = functools.partial(Norm, self.dtype)
    attend = Attention(**self.attention, dtype=self.dtype, name="self_attn")
    h = attend(norm(name="input_layernorm")(x), mask)
    x += norm(name="post_attention_layernorm")(h)
    dense = functools.partial(common.Dense, use_bias=False, dtype=self.dtype)
    h = norm(name="pre_feedforward_layernorm")(x)
    gate = nn.gelu(dense(self.hidden, name="mlp.gate_proj")(h), approximate=True)
    h = dense(x.shape[-1], name="mlp.down_proj")(
      gate * dense(self.hidden, name="mlp.up_proj")(h)
    )
    return x + norm(name="post_feedforward_layernorm")(h)


class Encoder(nn.Module):
  """Maps ids [B, L] to hidden states after the last norm, [B, L, width]."""

  vocabulary: int
  width: int
  depth: int
  block: dict[str, Json]
  remat: str

  @nn.compact
  def __call__(self, ids: Array, mask: Array | None) -> Array:
    dtype = self.block["dtype"]
    h = nn.Embed(self.vocabulary, self.width, dtype=dtype, name="embed_tokens")(ids)
    h *= jnp.asarray(self.width**0.5, dtype)
    (h,) = block_loop.run(
      self,
      LISTS[0],
      range(self.depth),
      Block,
      lambda i: self.block,
      (h,),
      mask,
      remat=self.remat,
    )
    return Norm(dtype, name="norm")(h)


def from_config(
  config: dict[str, Json], *, dtype: str = "float32", remat: str = ""
) -> TextEncoder:
  """Returns the text encoder of a config.json (arXiv:2408.00118, section 2).

  See `networks.FromConfig`.
  """
  c = config_fields.validated_config(config, FIELDS, SUPPORTED_VALUES, IGNORED_FIELDS)
  heads, groups, size = (
    c[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim")
  )
  if heads % groups or size % 2:
    raise ValueError(
      f"num_key_value_heads={groups}: must divide num_attention_heads={heads}, and "
      f"head_dim={size} must be even"
    )
  if c["pad_token_id"] >= c["vocab_size"]:
    raise ValueError(
      f"pad_token_id={c['pad_token_id']}: must be below vocab_size={c['vocab_size']}"
    )
  attention = {"heads": heads, "groups": groups, "size": size}
  attention |= {"scale": c["query_pre_attn_scalar"] ** -0.5}
  attention |= {"cap": c["attn_logit_softcapping"]}
  block = {"attention": attention, "hidden": c["intermediate_size"]}
  block |= {"dtype": jnp.dtype(dtype)}
  width, depth = c["hidden_size"], c["num_hidden_layers"]
  module = Encoder(c["vocab_size"], width, depth, block, remat)
  # Up to this length, attention in a window is attention.
  longest = min(c["sliding_window"] or np.inf, c["max_position_embeddings"])

  def init(key: PRNGKey) -> Params:
    return module.init(key, jnp.zeros((1, 1), jnp.int32), None)["params"]

  def apply(params: Params, ids: Array, mask: Array | None = None) -> Text:
    if ids.shape[1] > longest:
      raise ValueError(f"ids: texts of {ids.shape[1]} tokens, at most {longest} fit")
    hidden = module.apply({"params": params}, ids, mask)
    return Text(common.to_accumulation_dtype(hidden), mask=mask)

  sizes = c["vocab_size"], None, width
  return TextEncoder(init, apply, *sizes, c["pad_token_id"], LISTS)
