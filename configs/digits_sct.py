"""sCT on 8 x 8 digits: a consistency model trained on data, from the teacher's EMA."""

from sdiff_jax import config


def get_config():
  c = config.base()
  c.teacher.config = "configs/digits_diffusion.py"
  c.init_from = "runs/digits_diffusion"
  c.model = config.component("models", "mlp", width=256, depth=4)
  # w_phi(t) slows down a run this short: Fréchet distance .60 with it, .54 without.
  c.loss = config.component(
    "losses", "scm", velocity="data", warmup_steps=1600, adaptive_weight=False
  )
  c.train.update(steps=8000, batch_size=128, log_every=100, sample_every=2000)
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
