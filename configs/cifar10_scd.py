"""sCD on CIFAR-10, a consistency model without classes (arXiv:2410.11081, appendix G).

  python -m sdiff_jax.main --config=configs/cifar10_scd.py

Distills configs/cifar10_diffusion.py. Variant: `tiny`, seconds of work on digits. Not
run in full.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants


def get_config(variant: str = ""):
  (tiny,) = variants.parse(variant, variants.TINY_WORD)
  c = config.base()
  variants.distill(c, "configs/cifar10_diffusion.py", variant)
  c.data = config.component(
    "data", "tfds", tfds_name="cifar10", mean=(0.0,), std=(0.5,)
  )
  c.rehearse.update(shape=(32, 32, 3), classes=10)
  c.class_conditional = False
  c.model = config.component("models", "ddpmpp", dropout=0.0)
  c.loss = config.component("losses", "scm", velocity="teacher", p_mean=-1.0, p_std=1.4)
  # |g| as printed; the paper does not say whether the norm is a sum or a mean.
  c.loss.update(tangent_normalizer="l2", c=0.1, warmup_steps=10_000)
  # Ours: 400,000 steps, which the paper does not specify, and mirrored images.
  c.train.update(steps=400_000, batch_size=512, flip=True, log_every=100)
  c.checkpoint.update(every=5000, keep_every=50_000)
  c.optim.update(name="radam", learning_rate=1e-4, b1=0.9, b2=0.99, eps=1e-8)
  c.ema.profiles = ("half_life/500000",)
  c.sampler.update(name="consistency", steps=2)
  c.evaluate.update(num=50_000, samplers=("consistency/1", "consistency/2"))
  if tiny:
    variants.make_tiny(c)
  return c
