"""DDPM's U-Net, UNet2DModel of the diffusers format."""

from sdiff_jax.pretrained.diffusers import unet
from sdiff_jax.pretrained.diffusers.networks import Predictor
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import (
  Channels,
  ChannelsOfLevels,
  Field,
  Names,
)
from sdiff_jax.types import Json

FIELDS = unet.FIELDS | {
  "in_channels": Field(3, Channels),
  "out_channels": Field(3, Channels),
  "block_out_channels": Field((224, 448, 672, 896), ChannelsOfLevels),
  "down_block_types": Field(("DownBlock2D",) + ("AttnDownBlock2D",) * 3, Names),
  "up_block_types": Field(("AttnUpBlock2D",) * 3 + ("UpBlock2D",), Names),
  "attention_head_dim": Field(8, Channels | None),
  "add_attention": Field(True, bool),
}
SUPPORTED_VALUES = unet.SUPPORTED_VALUES | {
  "attn_norm_num_groups": unet.UNSUPPORTED_FIELDS,
  "downsample_type": ("conv",),
  "mid_block_type": ("UNetMidBlock2D",),
  "upsample_type": ("conv",),
}
IGNORED_FIELDS = ("dropout", "num_train_timesteps")


def from_config(
  config: dict[str, Json], *, dtype: str = "float32", remat: str = ""
) -> Predictor:
  """Returns the network of a config.json (arXiv:2006.11239, appendix B).

  See `networks.FromConfig`.
  """
  c = config_fields.validated_config(config, FIELDS, SUPPORTED_VALUES, IGNORED_FIELDS)
  # The field is the size of a head; None means one head.
  size = c["attention_head_dim"]
  heads = (max(1, width // (size or width)) for width in c["block_out_channels"])
  return unet.predictor(
    c,
    kinds={"": "none", "Attn": "self"},
    mid="self" if c["add_attention"] else "none",
    heads=tuple(heads),
    text=None,
    dtype=dtype,
    remat=remat,
  )
