"""TrigFlow teacher on latents of ImageNet 512 x 512 (arXiv:2410.11081, appendix G).

  python -m sdiff_jax.main --config=configs/imagenet512_diffusion.py:S

Variants: S, M, L, XL or XXL, and `tiny`, seconds of work on digits.
Not run in full.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants

# Steps, learning rate, dropout, relative width of the average that is used.
SIZES = {
  "S": (1_048_000, 1e-2, 0.0, 0.025),
  "M": (1_048_000, 9e-3, 0.1, 0.03),
  "L": (696_000, 8e-3, 0.1, 0.015),
  "XL": (598_000, 7e-3, 0.1, 0.02),
  "XXL": (376_000, 6.5e-3, 0.1, 0.015),
}


def get_config(variant: str = ""):
  size, tiny = variants.parse(variant, SIZES, variants.TINY_WORD)
  steps, rate, dropout, width = SIZES[size]
  c = config.base()
  c.data = config.component(
    "data", "latents", dir="runs/imagenet512_latents", scale="scm"
  )
  c.rehearse.update(shape=(64, 64, 4), classes=1000)
  # Dropout at every resolution, as in EDM2. With remat="full" it uses less memory.
  c.model = config.component("models", "edm2", preset=size, dropout=dropout)
  c.model.update(dropout_resolution=64, dtype="float16")
  c.loss = config.component(
    "losses", "diffusion", p_mean=-0.4, p_std=1.0, label_dropout=0.1
  )
  # Ours: a loss scale of the number of elements, as if the loss were their sum.
  c.train.update(steps=steps, batch_size=2048, log_every=100, loss_scale=2.0**14)
  c.checkpoint.update(every=2000, keep_every=50_000)
  c.optim.update(name="adam", learning_rate=rate, b1=0.9, b2=0.99, eps=1e-11)
  c.optim.update(schedule="inverse_sqrt", reference_steps=70_000)
  c.optim.rampup_images = 10_000_000  # EDM2's
  c.ema.profiles = (f"power/{width}",)
  c.sampler.update(name="heun", steps=32)  # 63 evaluations, each with and without label
  c.sample.guidance = 1.4 if size == "S" else 1.2
  c.evaluate.update(num=50_000, samplers=("heun/32",))
  if tiny:
    variants.make_tiny(c)
  return c
