"""sCT on Fashion-MNIST, from the teacher's weights.

  python -m sdiff_jax.main --config=configs/fashion_sct.py

Data, network and optimizer are those of configs/fashion_scd.py.
"""

import pathlib

from sdiff_jax import config
from sdiff_jax.experiment import variants

DISTILLATION = pathlib.Path(__file__).with_name("fashion_scd.py")


def get_config():
  c = config.inherit(DISTILLATION)
  variants.train_on_data(c)
  c.train.steps = 1500
  c.checkpoint.update(every=1000, keep_every=0)
  return c
