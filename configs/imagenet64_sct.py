"""sCT on ImageNet 64 x 64, from the teacher's weights (arXiv:2410.11081, appendix G).

  python -m sdiff_jax.main --config=configs/imagenet64_sct.py:S

All but the velocity and the dropout is as in configs/imagenet64_scd.py. Variants: S, M,
L or XL, and `tiny`, seconds of work on digits. Not run in full.
"""

import pathlib

from sdiff_jax import config
from sdiff_jax.experiment import variants

DISTILLATION = pathlib.Path(__file__).with_name("imagenet64_scd.py")


def get_config(variant: str = ""):
  c = config.inherit(DISTILLATION, variant)
  variants.train_on_data(c)
  c.model.dropout = 0.45
  return c
