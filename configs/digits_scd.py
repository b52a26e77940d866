"""sCD on 8 x 8 digits, a consistency model of one and two steps.

  python -m sdiff_jax.main --config=configs/digits_scd.py

Distills configs/digits_diffusion.py. Variant: `guided` also distills classifier-free
guidance of scale 1 to 2; choose the scale when sampling, --config.sample.guidance=1.5.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants


def get_config(variant: str = ""):
  (guided,) = variants.parse(variant, ("", "guided"))
  c = config.base()
  variants.distill(c, "configs/digits_diffusion.py")
  c.model = config.component("models", "mlp", width=256, depth=4, guidance=bool(guided))
  # w_phi(t) slows down a run this short: Fréchet distance .60 with it, .54 without.
  c.loss = config.component(
    "losses", "scm", velocity="teacher", warmup_steps=1600, adaptive_weight=False
  )
  c.loss.guidance = (1.0, 2.0) if guided else ()
  c.train.update(steps=10_000, batch_size=128, log_every=100, sample_every=2000)
  c.checkpoint.every = 2000
  # The target depends on the network itself. Momentum lags behind it, needs learning
  # rates a third as large, and ends worse.
  c.optim.update(
    learning_rate=2e-3, b1=0.0, b2=0.99, schedule="cosine", end_lr_fraction=0.02
  )
  c.ema.profiles = ("power/0.1",)
  c.sampler.update(name="consistency", steps=2)
  c.evaluate.samplers = ("consistency/1", "consistency/2")
  return c
