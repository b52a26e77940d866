"""All pieces of this folder in one run: python -m sdiff_jax.main --config=config.py."""

from sdiff_jax import config

# Modules that register pieces; they must be importable (PYTHONPATH=docs/extend).
PLUGINS = ("ab2", "blobs", "convnet", "count_parameters", "huber")


def get_config():
  c = config.base(PLUGINS)
  c.data = config.component("data", "blobs", size=8)
  c.model = config.component("models", "convnet", width=32)
  c.loss = config.component("losses", "huber", c=0.1)
  c.train.update(steps=500, batch_size=64)
  c.sampler.update(name="ab2", steps=12)
  return c
