"""sCD on latents of ImageNet 512 x 512 (arXiv:2410.11081, appendix G).

  python -m sdiff_jax.main --config=configs/imagenet512_scd.py:S

Distills configs/imagenet512_diffusion.py, with guidance. Variants: S, M, L, XL or XXL,
and `tiny`, seconds of work on digits. Not run in full.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants

# Learning rate, dropout.
SIZES = {
  "S": (1e-4, 0.0),
  "M": (9e-5, 0.1),
  "L": (8e-5, 0.1),
  "XL": (7e-5, 0.1),
  "XXL": (6.5e-5, 0.1),
}


def get_config(variant: str = ""):
  size, tiny = variants.parse(variant, SIZES, variants.TINY_WORD)
  rate, dropout = SIZES[size]
  c = config.base()
  variants.distill(c, "configs/imagenet512_diffusion.py", variant)
  c.data = config.component(
    "data", "latents", dir="runs/imagenet512_latents", scale="scm"
  )
  c.rehearse.update(shape=(64, 64, 4), classes=1000)
  c.model = config.component("models", "edm2", preset=size, dropout=dropout)
  c.model.update(guidance=True, dropout_resolution=16, dtype="float16")
  c.loss = config.component("losses", "scm", velocity="teacher", p_mean=-0.8, p_std=1.6)
  # |g| as printed; the paper does not say whether the norm is a sum or a mean.
  c.loss.update(
    tangent_normalizer="l2", c=0.1, warmup_steps=10_000, guidance=(1.0, 2.0)
  )
  # Ours: a loss scale of the number of elements, as if the loss were their sum.
  c.train.update(steps=200_000, batch_size=2048, log_every=100, loss_scale=2.0**14)
  c.checkpoint.update(every=2000, keep_every=10_000)
  c.optim.update(name="adam", learning_rate=rate, b1=0.9, b2=0.99, eps=1e-11)
  c.optim.update(schedule="inverse_sqrt", reference_steps=70_000)
  c.optim.rampup_images = 10_000_000  # EDM2's
  c.ema.profiles = ("power/0.05",)
  c.sampler.update(name="consistency", steps=2)
  # The best in 2 steps; in 1 step they are 1.5 and 1.3.
  c.sample.guidance = 1.4 if size == "S" else 1.2
  c.evaluate.update(num=50_000, samplers=("consistency/1", "consistency/2"))
  if tiny:
    variants.make_tiny(c)
  return c
