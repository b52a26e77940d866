"""The teacher: the model of random weights, trained on images with captions.

benchmarks/fashion_text/run.py makes the model and the data before.
"""

from sdiff_jax import config

FOLDER = "runs/fashion_text"


def get_config():
  c = config.base()
  c.data = config.component("data", "latents", dir=f"{FOLDER}/data", scale="pixels")
  c.reference = config.component("data", "idx", split="test")
  c.init_from = f"{FOLDER}/start"
  c.model = config.component("models", "pretrained", folder=f"{FOLDER}/start")
  c.loss = config.component("losses", "diffusion", label_dropout=0.1)
  c.train.update(steps=1500, batch_size=64, log_every=10)
  c.checkpoint.update(every=100)
  c.optim.update(learning_rate=2e-3, b2=0.99, schedule="cosine", clip=1.0)
  c.optim.rampup_images = 3200
  c.ema.profiles = ("power/0.1",)
  c.sampler.update(name="heun", steps=16)
  c.evaluate.update(features="fashion", num=5000, batch_size=500)
  c.evaluate.samplers = ("heun/16",)
  return c
