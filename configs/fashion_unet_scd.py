"""sCD on Fashion-MNIST with a small EDM2 U-Net: images in one and two steps.

  python -m sdiff_jax.main --config=configs/fashion_unet_scd.py

Distills configs/fashion_unet_diffusion.py, whose data, network and precision it has.
"""

import pathlib

from sdiff_jax import config
from sdiff_jax.experiment import variants

TEACHER = pathlib.Path(__file__).with_name("fashion_unet_diffusion.py")


def get_config():
  c = config.inherit(TEACHER)
  variants.distill(c, "configs/fashion_unet_diffusion.py")
  c.loss = config.component(
    "losses", "scm", velocity="teacher", warmup_steps=300, adaptive_weight=False
  )
  c.train.steps = 2724  # 60% of the FLOPs of the teacher
  c.checkpoint.update(every=454, keep_every=454)
  c.optim.update(learning_rate=3e-3, reference_steps=400)
  c.sampler.update(name="consistency", steps=2)
  c.evaluate.samplers = ("consistency/1", "consistency/2")
  return c
