"""sCT on latents of ImageNet 512 x 512, from the teacher's weights (arXiv:2410.11081).

  python -m sdiff_jax.main --config=configs/imagenet512_sct.py:S

Settings of appendix G; most are those of configs/imagenet512_scd.py. Variants: S, M, L,
XL or XXL, and `tiny`, seconds of work on digits. Not run in full.
"""

import pathlib

from sdiff_jax import config
from sdiff_jax.experiment import variants

DISTILLATION = pathlib.Path(__file__).with_name("imagenet512_scd.py")
DROPOUT = {"S": 0.25, "M": 0.35, "L": 0.35, "XL": 0.35, "XXL": 0.35}


def get_config(variant: str = ""):
  size, tiny = variants.parse(variant, DROPOUT, variants.TINY_WORD)
  c = config.inherit(DISTILLATION, variant)
  variants.train_on_data(c)
  c.model.update(dropout=DROPOUT[size], guidance=False)
  c.loss.guidance = ()
  c.sample.guidance = 1.0
  if not tiny:
    c.train.steps = 100_000
  return c
