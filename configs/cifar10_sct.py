"""sCT on CIFAR-10, from the teacher's weights (arXiv:2410.11081, appendix G).

  python -m sdiff_jax.main --config=configs/cifar10_sct.py

All but the velocity and the dropout is as in configs/cifar10_scd.py. Variant: `tiny`,
seconds of work on digits. Not run in full.
"""

import pathlib

from sdiff_jax import config
from sdiff_jax.experiment import variants

DISTILLATION = pathlib.Path(__file__).with_name("cifar10_scd.py")


def get_config(variant: str = ""):
  c = config.inherit(DISTILLATION, variant)
  variants.train_on_data(c)
  c.model.dropout = 0.20
  return c
