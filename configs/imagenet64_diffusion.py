"""TrigFlow teacher on ImageNet 64 x 64: EDM2's networks (arXiv:2410.11081, appendix G).

  python -m sdiff_jax.main --config=configs/imagenet64_diffusion.py:S

Variants: S, M, L or XL, and `tiny`, seconds of work on digits.
Not run in full.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants

# Steps, learning rate, dropout, relative width of the average that is used.
SIZES = {
  "S": (1_048_000, 1e-2, 0.0, 0.075),
  "M": (1_486_000, 9e-3, 0.1, 0.06),
  "L": (761_000, 8e-3, 0.1, 0.04),
  "XL": (540_000, 7e-3, 0.1, 0.04),
}


def get_config(variant: str = ""):
  size, tiny = variants.parse(variant, SIZES, variants.TINY_WORD)
  steps, rate, dropout, width = SIZES[size]
  c = config.base()
  # A folder for each class, as in ImageNet; larger images are cropped as in EDM2.
  c.data = config.component("data", "folder", dir="data/imagenet64", image_size=64)
  c.rehearse.update(shape=(64, 64, 3), classes=1000)
  # Dropout at every resolution, as in EDM2. With remat="full" it uses less memory.
  c.model = config.component("models", "edm2", preset=size, dropout=dropout)
  c.model.update(dropout_resolution=64, dtype="float16")
  # This data set is sampled without guidance, so labels are never dropped.
  c.loss = config.component(
    "losses", "diffusion", p_mean=-0.8, p_std=1.6, label_dropout=0.0
  )
  # Ours: a loss scale of about the number of pixels, as if the loss were their sum.
  c.train.update(steps=steps, batch_size=2048, log_every=100, loss_scale=2.0**14)
  c.checkpoint.update(every=2000, keep_every=50_000)
  c.optim.update(name="adam", learning_rate=rate, b1=0.9, b2=0.99, eps=1e-11)
  c.optim.update(schedule="inverse_sqrt", reference_steps=35_000)
  c.optim.rampup_images = 10_000_000  # EDM2's
  c.ema.profiles = (f"power/{width}",)
  c.sampler.update(name="heun", steps=32)  # 63 evaluations
  c.evaluate.update(num=50_000, samplers=("heun/32",))
  if tiny:
    variants.make_tiny(c)
  return c
