"""sCT on Fashion-MNIST with a small EDM2 U-Net: images in one and two steps.

  python -m sdiff_jax.main --config=configs/fashion_unet_sct.py

Starts from the weights of configs/fashion_unet_diffusion.py in the same variant, `h100`
(the default) or `laptop`, and has no teacher. Not run at full length.
"""

import pathlib

from sdiff_jax import config
from sdiff_jax.experiment import variants

DISTILLATION = pathlib.Path(__file__).with_name("fashion_unet_scd.py")


def get_config(variant: str = ""):
  c = config.inherit(DISTILLATION, variant)
  variants.train_on_data(c)
  return c
