"""Stable Diffusion's U-Net, UNet2DConditionModel of the diffusers format."""

from typing import Literal

from sdiff_jax.pretrained.diffusers import unet
from sdiff_jax.pretrained.diffusers.networks import TIME_IDS, Predictor
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import (
  Channels,
  ChannelsOfLevels,
  Field,
  Layers,
  LayersOfLevels,
  Names,
)
from sdiff_jax.types import Json

FIELDS = unet.FIELDS | {
  "in_channels": Field(4, Channels),
  "out_channels": Field(4, Channels),
  "block_out_channels": Field((320, 640, 1280, 1280), ChannelsOfLevels),
  "down_block_types": Field(("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), Names),
  "up_block_types": Field(("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, Names),
  "attention_head_dim": Field(8, Channels | ChannelsOfLevels),
  "cross_attention_dim": Field(1280, Channels | ChannelsOfLevels),
  "transformer_layers_per_block": Field(1, Layers | LayersOfLevels),
  "addition_embed_type": Field(None, Literal["text_time"] | None),
  "addition_time_embed_dim": Field(None, Channels | None),
  "projection_class_embeddings_input_dim": Field(None, Channels | None),
  "time_cond_proj_dim": Field(None, Channels | None),
}
SUPPORTED_VALUES = unet.SUPPORTED_VALUES | {
  "attention_type": ("default",),
  "class_embeddings_concat": unet.UNSUPPORTED_FIELDS,
  "conv_in_kernel": (3,),
  "conv_out_kernel": (3,),
  "cross_attention_norm": unet.UNSUPPORTED_FIELDS,
  "dual_cross_attention": unet.UNSUPPORTED_FIELDS,
  "encoder_hid_dim": unet.UNSUPPORTED_FIELDS,
  "encoder_hid_dim_type": unet.UNSUPPORTED_FIELDS,
  "mid_block_only_cross_attention": unet.UNSUPPORTED_FIELDS,
  "mid_block_type": ("UNetMidBlock2DCrossAttn",),
  "num_attention_heads": unet.UNSUPPORTED_FIELDS,
  "only_cross_attention": unet.UNSUPPORTED_FIELDS,
  "resnet_out_scale_factor": (1,),
  "resnet_skip_time_act": unet.UNSUPPORTED_FIELDS,
  "reverse_transformer_layers_per_block": unet.UNSUPPORTED_FIELDS,
  "time_embedding_act_fn": unet.UNSUPPORTED_FIELDS,
  "timestep_post_act": unet.UNSUPPORTED_FIELDS,
}
# There is no dropout in sampling, scores are always float32, and a linear layer is the
# same as a 1x1 convolution.
IGNORED_FIELDS = ("dropout", "upcast_attention", "use_linear_projection")
IGNORED_FIELDS += ("addition_embed_type_num_heads",)


def from_config(
  config: dict[str, Json], *, dtype: str = "float32", remat: str = ""
) -> Predictor:
  """Returns the network of a config.json (arXiv:2112.10752, E.2.1; XL: 2307.01952).

  See `networks.FromConfig`.
  """
  c = config_fields.validated_config(config, FIELDS, SUPPORTED_VALUES, IGNORED_FIELDS)
  levels = len(c["block_out_channels"])
  # In spite of its name, the field is the number of heads.
  heads = config_fields.each(c["attention_head_dim"], levels, "attention_head_dim")
  width = c["cross_attention_dim"]
  if not isinstance(width, int):
    raise ValueError(f"cross_attention_dim={width}: must be one number for all levels")
  return unet.predictor(
    c,
    kinds={"": "none", "CrossAttn": "text"},
    mid="text",
    heads=heads,
    text=width,
    pooled=_pooled(c),
    dtype=dtype,
    remat=remat,
  )


def _pooled(c: dict[str, Json]) -> int | None:
  """Returns the size of the pooled text that is embedded with sizes, or None."""
  if c["addition_embed_type"] is None:
    return None
  whole, features = (
    c[name] or 0
    for name in ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
  )
  if features < 2 or features % 2 or whole <= TIME_IDS * features:
    raise ValueError(
      f"projection_class_embeddings_input_dim={whole}: must be above {TIME_IDS} "
      f"addition_time_embed_dim={features}, which must be even"
    )
  return whole - TIME_IDS * features
