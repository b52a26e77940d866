"""TrigFlow teacher on 8 x 8 digits.

  python -m sdiff_jax.main --config=configs/digits_diffusion.py

About a minute on two CPU cores.
"""

from sdiff_jax import config


def get_config():
  c = config.base()
  c.model = config.component("models", "mlp", width=256, depth=4)
  c.loss = config.component("losses", "diffusion")
  c.train.update(steps=6000, batch_size=128, log_every=100, sample_every=1000)
  c.checkpoint.every = 2000
  c.optim.update(learning_rate=2e-3, schedule="cosine", end_lr_fraction=0.02)
  c.ema.profiles = ("power/0.1",)
  c.sampler.update(name="heun", steps=16)
  c.evaluate.samplers = ("heun/16", "ddim/8", "ddim/4", "ddim/2")
  c.evaluate.samplers += ("consistency/1", "consistency/2")
  c.evaluate.baselines = True
  return c
