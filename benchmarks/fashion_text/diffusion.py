"""The teacher: the model of random weights, trained on images with captions.

benchmarks/fashion_text/run.py makes the model and the data before. Variant: `short`.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants


def get_config(variant: str = ""):
  (short,) = variants.parse(variant, ("", "short"))
  folder = variants.workdir(f"fashion_text.py:{short}")
  c = config.base()
  c.data = config.component("data", "latents", dir=f"{folder}/data", scale="pixels")
  c.reference = config.component("data", "idx", split="test")
  c.init_from = f"{folder}/start"
  c.model = config.component("models", "pretrained", folder=f"{folder}/start")
  c.loss = config.component("losses", "diffusion", label_dropout=0.1)
  c.train.update(steps=1500, batch_size=64, log_every=10)
  c.checkpoint.update(every=100)
  c.optim.update(learning_rate=2e-3, b2=0.99, schedule="cosine", clip=1.0)
  c.optim.rampup_images = 3200
  c.ema.profiles = ("power/0.1",)
  c.sampler.update(name="heun", steps=16)
  c.evaluate.update(features="fashion", num=5000, batch_size=500)
  c.evaluate.samplers = ("heun/16",)
  if short:
    c.train.steps = 20
    c.evaluate.update(num=100, batch_size=50)
  return c
