"""sCT on 8 x 8 digits: a consistency model trained on data, from the teacher's EMA."""

from sdiff_jax import config


def get_config():
  c = config.base()
  c.teacher.config = "configs/digits_diffusion.py"
  c.model = config.use("models", "mlp", width=256, depth=4)
  c.loss = config.use("losses", "scm", velocity="data", warmup_steps=200)
  c.train.update(steps=1000, batch_size=128, log_every=50, sample_every=500)
  c.optim.update(learning_rate=1e-3, b2=0.99, schedule="cosine", final=0.02)
  c.ema.profiles = ("power/0.1",)
  c.sampler.update(name="consistency", steps=2)
  c.evaluate.samplers = ("consistency/1", "consistency/2")
  return c
