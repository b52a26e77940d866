"""sCD on Fashion-MNIST with a small EDM2 U-Net: images in one and two steps.

  python -m sdiff_jax.main --config=configs/fashion_unet_scd.py

Distills configs/fashion_unet_diffusion.py in the same variant, `h100` (the default) or
`laptop`, whose data, network and precision it has. `laptop,guided` also distills
classifier-free guidance of scale 1 to 2; choose it when sampling,
--config.sample.guidance=1.5.
"""

import pathlib

from sdiff_jax import config
from sdiff_jax.experiment import variants

TEACHER = pathlib.Path(__file__).with_name("fashion_unet_diffusion.py")


# Steps (60% of the FLOPs of the teacher), learning rate.
LENGTHS = {"h100": (2724, 3e-3), "laptop": (5000, 2e-3)}


def get_config(variant: str = ""):
  machine, guided = variants.parse(variant, LENGTHS, ("", "guided"))
  steps, rate = LENGTHS[machine]
  teacher = ",".join(word for word in variant.split(",") if word != "guided")
  c = config.inherit(TEACHER, teacher)
  variants.distill(c, "configs/fashion_unet_diffusion.py", teacher)
  c.loss = config.component(
    "losses", "scm", velocity="teacher", warmup_steps=300, adaptive_weight=False
  )
  c.loss.guidance = (1.0, 2.0) if guided else ()
  c.model.guidance = bool(guided)
  c.train.steps = steps
  c.checkpoint.update(every=steps // 6, keep_every=steps // 6)
  c.optim.update(learning_rate=rate, reference_steps=400)
  c.sampler.update(name="consistency", steps=2)
  c.evaluate.samplers = ("consistency/1", "consistency/2")
  return c
