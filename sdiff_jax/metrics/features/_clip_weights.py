"""Conversion of open_clip's tensors and config fields to those of transformers."""

import re
from typing import Annotated

import numpy as np
from msgspec import Meta

from sdiff_jax.pretrained.diffusers import clip_text
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Channels, Field
from sdiff_jax.types import Json

Ratio = Annotated[float, Meta(gt=0, le=64)]
ImageSide = Annotated[int, Meta(ge=1, le=4096)]  # pixels
SKIPPED = ("logit_scale", "attn_mask")  # of training; recomputed
# Fields of open_clip; the defaults are those of its code.
TOWER = {"layers": Field(12, clip_text.Layers), "mlp_ratio": Field(4.0, Ratio)}
TEXT = TOWER | {
  "context_length": Field(77, clip_text.Length),
  "vocab_size": Field(49408, clip_text.VocabularySize),
  "width": Field(512, Channels),
  "heads": Field(8, Channels),
}
VISION = TOWER | {
  "image_size": Field(224, ImageSide),
  "width": Field(768, Channels),
  "head_width": Field(64, Channels),
  "patch_size": Field(16, ImageSide),
}
MODEL = {
  "text_cfg": Field(None, dict),
  "vision_cfg": Field(None, dict),
  "embed_dim": Field(None, Channels),
  "quick_gelu": Field(False, bool | None),
}
# Patterns of open_clip's names -> names of transformers; LAYERS are those inside a block.
LAYERS = (
  (r"ln_1\.", "layer_norm1."),
  (r"ln_2\.", "layer_norm2."),
  (r"attn\.out_proj\.", "self_attn.out_proj."),
  (r"mlp\.c_fc\.", "mlp.fc1."),
  (r"mlp\.c_proj\.", "mlp.fc2."),
)
NAMES = (
  (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
  (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
  (
    r"^visual\.positional_embedding$",
    "vision_model.embeddings.position_embedding.weight",
  ),
  (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
  (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
  (r"^visual\.proj$", "visual_projection.weight"),
  (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
  (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
  (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
  (r"^ln_final\.", "text_model.final_layer_norm."),
  (r"^text_projection$", "text_projection.weight"),
  (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
)


def config(model: dict[str, Json]) -> dict[str, Json]:
  """Converts `model_cfg` of open_clip_config.json to a config of transformers.

  Raises:
    ValueError: fields of another architecture than CLIP's transformers.
  """
  model = {k: v for k, v in model.items() if k in MODEL}
  model = config_fields.validated_config(model, MODEL, {}, required=[*MODEL][:3])
  text = config_fields.validated_config(model["text_cfg"], TEXT, {})
  vision = config_fields.validated_config(model["vision_cfg"], VISION, {})
  act = "quick_gelu" if model.get("quick_gelu") else "gelu"

  def both(c: dict[str, Json], heads: int) -> dict[str, Json]:
    sizes = {"hidden_size": c["width"], "num_hidden_layers": c["layers"]}
    sizes |= {"intermediate_size": int(c["width"] * c["mlp_ratio"])}
    return sizes | {"num_attention_heads": heads, "hidden_act": act}

  return {
    "projection_dim": model["embed_dim"],
    "text_config": both(text, text["heads"])
    | {"vocab_size": text["vocab_size"], "eos_token_id": clip_text.OLD_END}
    | {"max_position_embeddings": text["context_length"]},
    "vision_config": both(vision, vision["width"] // vision["head_width"])
    | {"image_size": vision["image_size"], "patch_size": vision["patch_size"]},
  }


def convert_open_clip(
  tensors: dict[str, np.ndarray],
) -> dict[str, dict[str, np.ndarray]]:
  """Returns the tensors of the "text" and of the "vision" network.

  Args:
    tensors: by their names in transformers' CLIPModel, or in open_clip.
  """
  out = {"text": {}, "vision": {}}
  for name, x in _open_clip(tensors).items():
    # `load_state_dict` transposes what is named like an embedding table.
    name = name.replace("embeddings.patch_embedding.", "embeddings.patch.")
    part = "vision" if name.startswith("vis") else "text"
    out[part][name.removeprefix("vision_model.")] = x
  return out


def _open_clip(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames open_clip's tensors as in transformers; other names do not change."""
  out = {}
  for name, x in tensors.items():
    if name in ("visual.proj", "text_projection"):
      x = x.T
    if name not in SKIPPED:
      for pattern, theirs in NAMES + (LAYERS if "resblocks" in name else ()):
        name = re.sub(pattern, theirs, name)
      out[name] = x
  for name in [k for k in out if ".attn.in_proj_" in k]:
    for kind, x in zip("qkv", np.split(out.pop(name), 3), strict=True):
      out[name.replace("attn.in_proj_", f"self_attn.{kind}_proj.")] = x
  return out
