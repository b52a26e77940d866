"""sCD on Fashion-MNIST with a small EDM2 U-Net: images in one and two steps.

  python -m sdiff_jax.main --config=configs/fashion_unet_scd.py

Distills configs/fashion_unet_diffusion.py in the same variant, `h100` (the default) or
`laptop`, whose data, network and precision it has.
"""

import pathlib

from sdiff_jax import config
from sdiff_jax.experiment import variants

TEACHER = pathlib.Path(__file__).with_name("fashion_unet_diffusion.py")


# Steps (60% of the FLOPs of the teacher), learning rate.
LENGTHS = {"h100": (2724, 3e-3), "laptop": (2880, 2e-3)}


def get_config(variant: str = ""):
  (machine,) = variants.parse(variant, LENGTHS)
  steps, rate = LENGTHS[machine]
  c = config.inherit(TEACHER, variant)
  variants.distill(c, "configs/fashion_unet_diffusion.py", variant)
  c.loss = config.component(
    "losses", "scm", velocity="teacher", warmup_steps=300, adaptive_weight=False
  )
  c.train.steps = steps
  c.checkpoint.update(every=steps // 6, keep_every=steps // 6)
  c.optim.update(learning_rate=rate, reference_steps=400)
  c.sampler.update(name="consistency", steps=2)
  c.evaluate.samplers = ("consistency/1", "consistency/2")
  return c
