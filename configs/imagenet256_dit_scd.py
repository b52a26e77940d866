"""sCD on ImageNet 256 x 256, a consistency model with a transformer.

  python -m sdiff_jax.main --config=configs/imagenet256_dit_scd.py

Distills configs/imagenet256_dit_diffusion.py. The tangent uses fused attention, whose
memory is proportional to the 1,024 tokens. Rates are those of the smallest model on
ImageNet 512 (arXiv:2410.11081, table 5). Variant: `tiny`, seconds of work on digits.
Not run in full.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants


def get_config(variant: str = ""):
  (tiny,) = variants.parse(variant, variants.TINY_WORD)
  c = config.base()
  variants.distill(c, "configs/imagenet256_dit_diffusion.py", variant)
  c.data = config.component("data", "tfds", tfds_name="imagenet2012", image_size=256)
  c.rehearse.update(shape=(256, 256, 3), classes=1000)
  c.model = config.component("models", "dit", patch=8, width=768, depth=12, heads=12)
  c.model.update(remat="full", dtype="bfloat16", attention="fused")
  c.loss = config.component("losses", "scm", velocity="teacher", p_mean=-0.8, p_std=1.6)
  c.train.update(steps=200_000, batch_size=256, flip=True, log_every=100)
  c.checkpoint.every = 5000
  c.optim.update(learning_rate=1e-4, b2=0.99)
  c.sampler.update(name="consistency", steps=2)
  c.evaluate.samplers = ("consistency/1", "consistency/2")
  if tiny:
    variants.make_tiny(c)
  return c
