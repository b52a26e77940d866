"""CLIP: embeddings of images and of their texts."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import registry
from sdiff_jax.io import downloads
from sdiff_jax.metrics.features import _clip_weights as clip_weights
from sdiff_jax.metrics.features import _resize as resize
from sdiff_jax.metrics.features._base import FeatureNetwork
from sdiff_jax.models.layers.normalization import LayerNorm
from sdiff_jax.pretrained.diffusers import clip_text, networks
from sdiff_jax.pretrained.diffusers import tokenizer as tokenizer_lib
from sdiff_jax.pretrained.files import config_fields, state_dict
from sdiff_jax.pretrained.files.config_fields import Channels, Field, Fraction
from sdiff_jax.types import Array, Json, Params, PRNGKey, UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TEXT_BATCH = 64
FILES = ("model.safetensors", "pytorch_model.bin")  # of transformers
OPEN_FILES = tuple(f"open_clip_{name}" for name in FILES)
VISION = {  # fields of transformers; the defaults are those of ViT-B/32
  "hidden_size": Field(768, Channels),
  "intermediate_size": Field(3072, Channels),
  "num_hidden_layers": Field(12, clip_text.Layers),
  "num_attention_heads": Field(12, Channels),
  "image_size": Field(224, clip_weights.ImageSide),
  "patch_size": Field(32, clip_weights.ImageSide),
  "hidden_act": Field("quick_gelu", clip_text.Activation),
  "layer_norm_eps": Field(1e-5, Fraction),
}
PARTS = {
  "text_config": Field(None, dict),
  "vision_config": Field(None, dict),
  "projection_dim": Field(512, Channels),
}


class Towers(NamedTuple):
  """The image and the text network, whose embeddings have length 1.

  Attributes:
    init: (key) -> params, {"text": ..., "vision": ...}.
    image: (params of vision, images uint8 [B, H, W, C]) -> [B, E].
    text: (params of text, ids int32 [B, L]) -> [B, E].
    length: largest L.
  """

  init: Callable[[PRNGKey], Params]
  image: Callable[[Params, Array], Array]
  text: Callable[[Params, Array], Array]
  length: int


class Vision(nn.Module):
  """Vision transformer, from normalized pixels [B, H, W, 3] to [B, E]."""

  width: int
  depth: int
  patch: int
  out: int
  block: dict[str, Json]

  @nn.compact
  def __call__(self, x: Array) -> Array:
    side, zeros = (self.patch, self.patch), nn.initializers.zeros
    norm = {"epsilon": self.block["eps"], "dtype": jnp.float32}
    patches = nn.Conv(
      self.width, side, side, "VALID", use_bias=False, name="embeddings.patch"
    )(x)
    h = patches.reshape(len(x), -1, self.width)
    class_token = self.param("embeddings.class_embedding", zeros, (self.width,))
    class_token = jnp.broadcast_to(class_token, (len(x), 1, self.width))
    h = jnp.concatenate([class_token, h], axis=1)
    positions = nn.Embed(h.shape[1], self.width, name="embeddings.position_embedding")
    h += positions(jnp.arange(h.shape[1]))[None]
    h = LayerNorm(**norm, name="pre_layrnorm")(h)
    for i in range(self.depth):
      name = f"encoder.layers.{i}"
      h = clip_text.Block(**self.block, causal=False, name=name)(h)
    h = LayerNorm(**norm, name="post_layernorm")(h[:, 0])
    return nn.Dense(self.out, use_bias=False, name="visual_projection")(h)


@registry.register("metrics.features", "clip", columns={})
def load(folder: str) -> FeatureNetwork:
  """Returns CLIP, whose image and text embeddings have length 1.

  Args:
    folder: with a config, weights and a tokenizer, of transformers' CLIPModel or of
      open_clip (open_clip_config.json, open_clip_model.safetensors or
      open_clip_pytorch_model.bin).

  Raises:
    UserError: files are missing or damaged, or do not fit each other.

  Reference: Radford et al., arXiv:2103.00020.
  """
  folder = downloads.local(folder)
  open_clip = os.path.exists(os.path.join(folder, "open_clip_config.json"))
  name = "open_clip_config.json" if open_clip else "config.json"
  config = config_fields.read_config(os.path.join(folder, name))
  try:
    if open_clip:
      section = config.get("model_cfg")
      if not isinstance(section, dict):
        raise ValueError(
          f"model_cfg={config_fields.quoted(section)}: must be a mapping"
        )
      config = clip_weights.config(section)
    towers = from_config(config)
  except ValueError as error:
    raise UserError(f"{folder}: {name} is no supported CLIP: {error}") from error
  params = _params(folder, towers, OPEN_FILES if open_clip else FILES)
  tokenizer = tokenizer_lib.load(folder, towers.length)
  text = jax.jit(towers.text)
  params_text = jax.device_put(params["text"])

  def encode(texts: Sequence[str]) -> np.ndarray:
    embeddings = []
    for first in range(0, len(texts), TEXT_BATCH):
      batch = [*texts[first : first + TEXT_BATCH]]
      ids = tokenizer.encode(batch + [""] * (TEXT_BATCH - len(batch)))
      out = text(params_text, jax.device_put(ids))
      embeddings.append(np.asarray(out)[: len(batch)])
    return np.concatenate(embeddings)

  return FeatureNetwork(None, towers.image, params["vision"], text=encode)


def from_config(config: dict[str, Json]) -> Towers:
  """Returns the networks of a config.json of transformers' CLIPModel.

  Raises:
    ValueError: sizes that do not fit, or values that are not supported.
  """
  config = {k: v for k, v in config.items() if k in PARTS}
  parts = config_fields.validated_config(config, PARTS, {}, required=[*PARTS][:2])
  text_config, vision_config, out = parts.values()
  text_config = {k: v for k, v in text_config.items() if k in clip_text.FIELDS}
  encoder = clip_text.from_config(text_config)
  vision_config = {k: v for k, v in vision_config.items() if k in VISION}
  c = config_fields.validated_config(vision_config, VISION, {})
  width, side = c["hidden_size"], c["image_size"]
  if width % c["num_attention_heads"]:
    raise ValueError(
      f"num_attention_heads={c['num_attention_heads']}: must divide hidden_size={width} "
      "of vision_config"
    )
  if c["patch_size"] > side:
    raise ValueError(
      f"patch_size={c['patch_size']}: must be at most image_size={side} of vision_config"
    )
  block = {"heads": c["num_attention_heads"], "hidden": c["intermediate_size"]}
  block |= {"act": c["hidden_act"], "eps": c["layer_norm_eps"], "dtype": jnp.float32}
  vision = Vision(width, c["num_hidden_layers"], c["patch_size"], out, block)

  def init(key: PRNGKey) -> Params:
    kernel = jnp.zeros((encoder.width, out))
    text = encoder.init(key) | {"text_projection": {"kernel": kernel}}
    pixels = jnp.zeros((1, side, side, 3))
    return {"text": text, "vision": vision.init(key, pixels)["params"]}

  def image(params: Params, images: Array) -> Array:
    with jax.default_matmul_precision("highest"):
      return _unit(vision.apply({"params": params}, pixels(images, side)))

  def text(params: Params, ids: Array) -> Array:
    inner = {k: v for k, v in params.items() if k != "text_projection"}
    with jax.default_matmul_precision("highest"):
      pooled = encoder.apply(inner, ids).pooled
      return _unit(pooled @ params["text_projection"]["kernel"])

  return Towers(init, image, text, encoder.length)


def pixels(images: Array, side: int) -> Array:
  """Preprocesses images as CLIP's training did, to float32 [B, side, side, 3].

  The smaller side is resized by Pillow's bicubic filter, the center is cropped, and
  pixels are normalized by CLIP's mean and standard deviation.
  """
  if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
    raise ValueError(
      f"CLIP takes images uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}"
    )
  x = jnp.broadcast_to(images, (*images.shape[:3], 3))
  small = min(x.shape[1:3])
  x = resize.pillow_bicubic(x, *(n * side // small for n in x.shape[1:3]))
  top, left = (round((n - side) / 2) for n in x.shape[1:3])
  x = x[:, top : top + side, left : left + side] / 255
  mean, std = (jnp.array(v, jnp.float32).reshape(1, 1, 1, 3) for v in (MEAN, STD))
  return (x - mean) / std


def _unit(x: Array) -> Array:
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def _params(folder: str, towers: Towers, files: Sequence[str]) -> Params:
  """Returns the parameters of both networks, from the first file that exists."""
  paths = [p for p in (os.path.join(folder, f) for f in files) if os.path.exists(p)]
  if not paths:
    raise UserError(f"{folder}: has no weights, none of {', '.join(files)}")
  tensors = clip_weights.convert_open_clip(state_dict.read(paths[0]))
  return {
    part: networks.load_state_dict(
      tensors[part],
      lambda key, part=part: towers.init(key)[part],
      dtype="float32",
      path=paths[0],
      network=f"CLIP's {part} network",
    )
    for part in ("text", "vision")
  }
