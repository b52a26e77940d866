"""A policy for Push-T, by the scripted expert of --job=demos.

Small and in the block's frame: minutes on two CPU cores. With the word `published`,
Diffusion Policy's own experiment (arXiv:2303.04137, low-dimensional states): keypoints
and targets in the square, a 1-D U-Net, DDPM.
"""

from sdiff_jax import config
from sdiff_jax.interfaces import UserError


def get_config(words: str = ""):
  if words not in ("", "published"):
    raise UserError(f"configs/pusht_diffusion.py:{words}: the only word is 'published'")
  c = published() if words else small()
  c.sampler.update(name="ddim", steps=15, window=20)
  c.rollout.samplers = ("ddpm/100", "paraddpm/100", "specddpm/100", "ddim/15")
  c.rollout.samplers += ("paraddim/15", "dpmpp2m/15", "paradpmpp2m/15")
  return c


def small():
  c = config.base()
  c.data = config.use("data", "trajectories", path="runs/pusht/block.npz")
  c.data.update(n_obs_steps=1, action_range="percentile")
  c.model = config.use("models", "mlp", width=256, depth=4, embed=256)
  c.loss = config.use("losses", "diffusion")
  c.train.update(steps=6000, batch_size=256, log_every=100)
  c.checkpoint.every = 1000
  c.optim.update(name="adamw", learning_rate=1e-3, b1=0.95, weight_decay=1e-4, clip=1.0)
  c.optim.update(schedule="cosine", rampup_images=256 * 300, final=0.02)
  c.ema.profiles = ("power/0.1",)
  return c
