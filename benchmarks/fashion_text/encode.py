"""Images with captions, for --job=encode: pixels, and the hidden states of the texts.

Variant: `short`, of another folder.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants


def get_config(variant: str = ""):
  (short,) = variants.parse(variant, ("", "short"))
  folder = variants.workdir(f"fashion_text.py:{short}")
  c = config.base()
  images = {"dir": f"{folder}/images", "image_size": 28, "channels": 1}
  c.data = config.component("data", "captions", **images)
  c.text_encoder = f"{folder}/start"
  c.encode.update(scale="pixels", batch_size=64, shard_size=20_000)
  return c
