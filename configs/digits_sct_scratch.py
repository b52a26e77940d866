"""sCT on 8 x 8 digits from random weights: no teacher, and no run to start from.

  python -m sdiff_jax.main --config=configs/digits_sct_scratch.py

While the warm-up r of the tangent is near 0 the loss is that of a diffusion model, so
the first steps replace its training.

  python -m sdiff_jax.main --config=configs/digits_sct_scratch.py

A little over a minute on two idle cores. Frechet distance of seed 0 with `--job=evaluate`:
0.41 in one step and 0.37 in two. configs/digits_sct.py, which starts from a trained
diffusion model, reaches 0.43 and 0.39.
"""

from sdiff_jax import config


def get_config():
  c = config.base()
  c.model = config.component("models", "mlp", width=256, depth=4)
  c.loss = config.component(
    "losses", "scm", velocity="data", warmup_steps=6000, adaptive_weight=False
  )
  c.train.update(steps=12_000, batch_size=128, log_every=100, sample_every=2000)
  c.checkpoint.every = 2000
  c.optim.update(
    learning_rate=2e-3, b1=0.0, b2=0.99, schedule="cosine", end_lr_fraction=0.02
  )
  c.ema.profiles = ("power/0.1",)
  c.sampler.update(name="consistency", steps=2)
  c.evaluate.samplers = ("consistency/1", "consistency/2")
  return c
