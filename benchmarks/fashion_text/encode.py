"""Images with captions, for --job=encode: pixels, and the hidden states of the texts."""

from sdiff_jax import config

FOLDER = "runs/fashion_text"


def get_config():
  c = config.base()
  images = {"dir": f"{FOLDER}/images", "image_size": 28, "channels": 1}
  c.data = config.component("data", "captions", **images)
  c.text_encoder = f"{FOLDER}/start"
  c.encode.update(scale="pixels", batch_size=64, shard_size=20_000)
  return c
