"""sCD on 8 x 8 digits: distils configs/digits_diffusion.py to one and two steps.

`configs/digits_scd.py:guided` distils classifier-free guidance of scale 1 to 2 with
it; pick the scale when sampling, --config.sample.guidance=1.5.
"""

from sdiff_jax import config
from sdiff_jax.types import UserError


def get_config(words: str = ""):
  if words not in ("", "guided"):
    raise UserError(f"configs/digits_scd.py:{words}: the only word is 'guided'")
  guided = words == "guided"
  c = config.base()
  c.teacher.config = "configs/digits_diffusion.py"
  c.teacher.workdir = "runs/digits_diffusion"
  c.init_from = c.teacher.get_oneway_ref("workdir")
  c.model = config.component("models", "mlp", width=256, depth=4, guidance=guided)
  # w_phi(t) slows so short a run down: Frechet distance .60 with it, .54 without.
  c.loss = config.component(
    "losses", "scm", velocity="teacher", warmup_steps=1600, adaptive_weight=False
  )
  c.loss.guidance = (1.0, 2.0) if guided else ()
  c.train.update(steps=10_000, batch_size=128, log_every=100, sample_every=2000)
  c.checkpoint.every = 2000
  # The target is the network's own: momentum, which lags behind it, needs rates that
  # are three times as small, and then ends worse.
  c.optim.update(
    learning_rate=2e-3, b1=0.0, b2=0.99, schedule="cosine", end_lr_fraction=0.02
  )
  c.ema.profiles = ("power/0.1",)
  c.sampler.update(name="consistency", steps=2)
  c.evaluate.samplers = ("consistency/1", "consistency/2")
  return c
