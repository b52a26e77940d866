"""TrigFlow teacher on ImageNet 256 x 256 with classes: a transformer of 1,024 tokens.

  python -m sdiff_jax.main --config=configs/imagenet256_dit_diffusion.py

Pixels in patches of 8, from TensorFlow Datasets (`tfds build imagenet2012
--file_format=array_record`); latents of 32 x 32 x 4 with model.patch=1 give as many
tokens. Sizes and learning rate are those of DiT-B (arXiv:2212.09748). Variant: `tiny`,
seconds of work on digits. Not run in full.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants


def get_config(variant: str = ""):
  (tiny,) = variants.parse(variant, variants.TINY_WORD)
  c = config.base()
  c.data = config.component("data", "tfds", tfds_name="imagenet2012", image_size=256)
  c.rehearse.update(shape=(256, 256, 3), classes=1000)
  c.model = config.component("models", "dit", patch=8, width=768, depth=12, heads=12)
  c.model.update(remat="full", dtype="bfloat16", attention="fused")
  c.loss = config.component("losses", "diffusion")
  c.train.update(steps=400_000, batch_size=256, flip=True, log_every=100)
  c.checkpoint.every = 5000
  c.optim.update(name="adamw", learning_rate=1e-4, rampup_images=1_000_000, clip=1.0)
  c.sampler.update(name="heun", steps=32)
  c.evaluate.samplers = ("heun/32",)
  if tiny:
    variants.make_tiny(c)
  return c
