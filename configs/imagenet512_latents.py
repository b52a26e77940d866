"""Latents of ImageNet 512 x 512, for configs/imagenet512_*.py.

  python -m sdiff_jax.main --config=configs/imagenet512_latents.py --config.vae=DIR

DIR is sd-vae-ft-mse in the diffusers format. Images are cropped as in ADM. Not run.
"""

from sdiff_jax import config


def get_config():
  c = config.base()
  c.job = "encode"
  c.data = config.component("data", "folder", dir="data/imagenet", image_size=512)
  return c
