"""TrigFlow teacher on CIFAR-10 without classes: DDPM++ (arXiv:2410.11081, appendix G).

  python -m sdiff_jax.main --config=configs/cifar10_diffusion.py

Variant: `tiny`, seconds of work on digits. Not run in full.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants


def get_config(variant: str = ""):
  (tiny,) = variants.parse(variant, variants.TINY_WORD)
  c = config.base()
  c.data = config.component(
    "data", "tfds", tfds_name="cifar10", mean=(0.0,), std=(0.5,)
  )
  c.rehearse.update(shape=(32, 32, 3), classes=10)
  c.class_conditional = False
  c.model = config.component("models", "ddpmpp", dropout=0.13)
  # The paper gives no proposal distribution; this is EDM's, whose settings it uses.
  c.loss = config.component(
    "losses", "diffusion", p_mean=-1.2, p_std=1.2, label_dropout=0.0
  )
  # Ours: mirrored images. EDM augments more and conditions the network on it.
  c.train.update(steps=400_000, batch_size=512, flip=True, log_every=100)
  c.checkpoint.update(every=5000, keep_every=50_000)
  c.optim.update(name="adam", learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8)
  c.optim.rampup_images = 10_000_000  # EDM's
  c.ema.profiles = ("half_life/500000",)
  c.sampler.update(name="heun", steps=18)  # 35 evaluations
  c.evaluate.update(num=50_000, samplers=("heun/18",))
  if tiny:
    variants.make_tiny(c)
  return c
