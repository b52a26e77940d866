"""sCT on 8 x 8 digits, from the teacher's weights.

  python -m sdiff_jax.main --config=configs/digits_sct.py

All but the velocity and the number of steps is as in configs/digits_scd.py.
"""

import pathlib

from sdiff_jax import config
from sdiff_jax.experiment import variants

DISTILLATION = pathlib.Path(__file__).with_name("digits_scd.py")


def get_config():
  c = config.inherit(DISTILLATION)
  variants.train_on_data(c)
  c.train.steps = 8000
  return c
