"""The student: consistency distillation of the published folder, on the same captions.

The network is told its time as a timestep of up to 1,000, so its tangent is too large for
sCD (docs/guides/pretrained.md); adjacent noise levels do without. Variant: `short`.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants


def get_config(variant: str = ""):
  (short,) = variants.parse(variant, ("", "short"))
  folder = variants.workdir(f"fashion_text.py:{short}")
  c = config.base()
  c.data = config.component("data", "latents", dir=f"{folder}/data", scale="pixels")
  c.reference = config.component("data", "idx", split="test")
  c.teacher.folder = c.init_from = f"{folder}/published"
  c.model = config.component("models", "pretrained", folder=f"{folder}/published")
  c.loss = config.component(
    "losses", "consistency", velocity="teacher", levels=(18, 18), p_std=2.0
  )
  c.train.update(steps=1300, batch_size=64, log_every=10)
  c.checkpoint.update(every=100)
  c.optim.update(learning_rate=1e-3, b1=0.9, b2=0.99, schedule="cosine", clip=1.0)
  c.optim.end_lr_fraction = 0.02
  c.ema.profiles = ("power/0.1",)
  c.sampler.update(name="consistency", steps=2)
  c.evaluate.update(features="fashion", num=5000, batch_size=500)
  c.evaluate.samplers = ("consistency/1", "consistency/2", "consistency/4")
  if short:
    c.train.steps = 20
    c.evaluate.update(num=100, batch_size=50)
  return c
