"""sCD on ImageNet 64 x 64, a consistency model (arXiv:2410.11081, appendix G).

  python -m sdiff_jax.main --config=configs/imagenet64_scd.py:S

Distills configs/imagenet64_diffusion.py. Variants: S, M, L or XL, and `tiny`, seconds of
work on digits. Not run in full.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants

RATES = {"S": 1e-4, "M": 9e-5, "L": 8e-5, "XL": 7e-5}


def get_config(variant: str = ""):
  size, tiny = variants.parse(variant, RATES, variants.TINY_WORD)
  c = config.base()
  variants.distill(c, "configs/imagenet64_diffusion.py", variant)
  c.data = config.component("data", "folder", dir="data/imagenet64", image_size=64)
  c.rehearse.update(shape=(64, 64, 3), classes=1000)
  c.model = config.component("models", "edm2", preset=size, dropout=0.0)
  c.model.update(dropout_resolution=16, dtype="float16")
  c.loss = config.component("losses", "scm", velocity="teacher", p_mean=-1.0, p_std=1.6)
  # |g| as printed; the paper does not say whether the norm is a sum or a mean.
  c.loss.update(tangent_normalizer="l2", c=0.1, warmup_steps=10_000)
  # Ours: a loss scale of about the number of pixels, as if the loss were their sum.
  c.train.update(steps=400_000, batch_size=2048, log_every=100, loss_scale=2.0**14)
  c.checkpoint.update(every=2000, keep_every=20_000)
  c.optim.update(name="adam", learning_rate=RATES[size], b1=0.9, b2=0.99, eps=1e-11)
  c.optim.update(schedule="inverse_sqrt", reference_steps=35_000)
  c.optim.rampup_images = 10_000_000  # EDM2's
  c.ema.profiles = ("power/0.05",)
  c.sampler.update(name="consistency", steps=2)
  c.evaluate.update(num=50_000, samplers=("consistency/1", "consistency/2"))
  if tiny:
    variants.make_tiny(c)
  return c
