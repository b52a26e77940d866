"""TrigFlow teacher on Fashion-MNIST, 28 x 28.

  python -m sdiff_jax.main --config=configs/fashion_diffusion.py

The images are those of Debian's package dataset-fashion-mnist.
"""

from sdiff_jax import config


def get_config():
  c = config.base()
  c.data = config.component("data", "idx")
  c.reference = config.component("data", "idx", split="test")
  c.model = config.component("models", "mlp", width=1024, depth=4)
  c.loss = config.component("losses", "diffusion")
  c.train.update(steps=2500, batch_size=256, log_every=50, sample_every=500)
  c.optim.update(learning_rate=1e-3, schedule="cosine", end_lr_fraction=0.02)
  c.ema.profiles = ("power/0.1",)
  c.sampler.update(name="heun", steps=16)
  c.evaluate.update(features="fashion", num=20_000, batch_size=1000, baselines=True)
  c.evaluate.samplers = ("heun/16", "ddim/8", "ddim/4", "consistency/1")
  c.evaluate.samplers += ("consistency/2",)
  return c
