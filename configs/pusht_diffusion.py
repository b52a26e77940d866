"""A policy for Push-T, taught by the scripted expert of --job=demos.

Small, and in the block's frame: minutes on two CPU cores. The variant `published` is
Diffusion Policy's own experiment with low-dimensional states (arXiv:2303.04137):
keypoints and targets in the square, the 1-D U-Net, DDPM.

  python -m sdiff_jax.main --config=configs/pusht_diffusion.py --job=demos
  python -m sdiff_jax.main --config=configs/pusht_diffusion.py
  python -m sdiff_jax.main --config=configs/pusht_diffusion.py --job=rollout
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants


def get_config(variant: str = ""):
  (as_published,) = variants.parse(variant, ("", "published"))
  c = config.base()
  c.optim.update(name="adamw", b1=0.95, schedule="cosine")
  published(c) if as_published else small(c)
  c.sampler.update(name="ddim", steps=15, window=20)
  c.rollout.samplers = ("ddim/15", "paraddim/15", "dpmpp2m/15", "paradpmpp2m/15")
  c.rollout.samplers += ("ddpm/100", "paraddpm/100", "specddpm/100")
  return c


def small(c):
  c.data = config.component("data", "trajectories", path="runs/pusht/block.npz")
  # Chunks continue to the end of an episode, where the last alignment happens.
  c.data.update(n_obs_steps=1, n_action_steps=16)
  c.data.update(observation_range="percentile", action_range="percentile")
  c.model = config.component("models", "mlp", width=256, depth=4, embed=256)
  c.loss = config.component("losses", "diffusion")
  c.train.update(steps=6000, batch_size=256, log_every=100)
  c.checkpoint.every = 1000
  c.ema.profiles = ("power/0.1",)
  c.optim.update(learning_rate=1e-3, weight_decay=1e-4, clip=1.0, end_lr_fraction=0.02)
  c.optim.rampup_images = 300 * c.train.batch_size


def published(c):
  c.sigma_d = 1.0
  c.data = config.component("data", "trajectories", path="runs/pusht/keypoints.npz")
  c.data.frame = "keypoints"
  # As many episodes as its authors used; actions in [-1, 1] are not scaled again.
  c.data.update(episodes=90, held_out=0.02, std=1.0)
  c.model = config.component("models", "unet1d", process="ddpm")
  c.loss = config.component("losses", "ddpm")
  # 5000 epochs of about 11,200 windows.
  c.train.update(steps=219_000, batch_size=256, log_every=100)
  c.checkpoint.every = 10_000
  c.ema.profiles = ("warmup/0.75",)
  c.optim.update(learning_rate=1e-4, weight_decay=1e-6)
  c.optim.rampup_images = 500 * c.train.batch_size
