"""Diffusion Policy on Franka Kitchen, low-dimensional states (arXiv:2303.04137).

  python -m sdiff_jax.main --config=configs/kitchen_diffusion.py

Needs the demonstrations of relay policy learning, .mjl logs of positions. The published
run adds noise to observations, a tenth of that of the sensors; this one does not. Not
run.
"""

from sdiff_jax import config


def get_config():
  c = config.base()
  c.sigma_d = 1.0
  # Numbers that hardly change are not scaled up.
  c.data = config.component(
    "data",
    "trajectories",
    path="data/kitchen/kitchen_demos_multitask",
    held_out=0.02,
    min_range=5e-2,
    std=1.0,
  )
  c.model = config.component("models", "unet1d", process="ddpm")
  c.loss = config.component("losses", "ddpm")
  # 5000 epochs of about 130,000 windows.
  c.train.update(steps=2_500_000, batch_size=256, log_every=100)
  c.checkpoint.update(every=5000, keep_every=50_000)
  c.optim.update(name="adamw", learning_rate=1e-4, b1=0.95, b2=0.999)
  c.optim.update(weight_decay=1e-6, schedule="cosine", rampup_images=500 * 256)
  c.ema.profiles = ("warmup/0.75",)
  c.sampler.update(name="ddpm", steps=100)
  return c
