"""Diffusion Policy on robomimic's Square, low-dimensional states (arXiv:2303.04137).

  python -m sdiff_jax.main --config=configs/square_diffusion.py

Needs the files of robomimic, low_dim.hdf5. Variant: `absolute` uses poses as actions
instead of motions, and needs low_dim_abs.hdf5. Not run.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants

FILES = {"": "low_dim.hdf5", "absolute": "low_dim_abs.hdf5"}


def get_config(variant: str = ""):
  (actions,) = variants.parse(variant, FILES)
  c = config.base()
  c.sigma_d = 1.0
  # Motions are in [-1, 1] already; the positions of poses are scaled to that range.
  c.data = config.component(
    "data",
    "trajectories",
    path=f"data/robomimic/datasets/square/ph/{FILES[actions]}",
    held_out=0.02,
    observation_range="max_abs",
    action_range="position" if actions else "none",
    absolute=bool(actions),
    std=1.0,
  )
  c.model = config.component("models", "unet1d", process="ddpm")
  c.loss = config.component("losses", "ddpm")
  # 5000 epochs of about 30,000 windows.
  c.train.update(steps=590_000, batch_size=256, log_every=100)
  c.checkpoint.update(every=5000, keep_every=50_000)
  c.optim.update(name="adamw", learning_rate=1e-4, b1=0.95, b2=0.999)
  c.optim.update(weight_decay=1e-6, schedule="cosine", rampup_images=500 * 256)
  c.ema.profiles = ("warmup/0.75",)
  c.sampler.update(name="ddpm", steps=100)
  return c
