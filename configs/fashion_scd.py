"""sCD on Fashion-MNIST, a consistency model of one and two steps.

  python -m sdiff_jax.main --config=configs/fashion_scd.py

Distills configs/fashion_diffusion.py.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants


def get_config():
  c = config.base()
  variants.distill(c, "configs/fashion_diffusion.py")
  c.data = config.component("data", "idx")
  c.reference = config.component("data", "idx", split="test")
  c.model = config.component("models", "mlp", width=1024, depth=4)
  c.loss = config.component(
    "losses", "scm", velocity="teacher", warmup_steps=300, adaptive_weight=False
  )
  c.train.update(steps=2100, batch_size=256, log_every=50, sample_every=300)
  c.checkpoint.update(every=300, keep_every=300)
  c.optim.update(
    learning_rate=1e-3, b1=0.0, b2=0.99, schedule="cosine", end_lr_fraction=0.02
  )
  c.ema.profiles = ("power/0.1",)
  c.sampler.update(name="consistency", steps=2)
  c.evaluate.update(features="fashion", num=20_000, batch_size=1000)
  c.evaluate.samplers = ("consistency/1", "consistency/2")
  return c
