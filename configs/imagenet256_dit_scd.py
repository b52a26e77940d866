"""sCD on ImageNet 256 x 256: distils configs/imagenet256_dit_diffusion.py.

The tangent goes through fused attention, in memory proportional to the 1,024 tokens.
`configs/imagenet256_dit_scd.py:tiny` runs on a laptop, on digits. Not run in full;
rates are those of the smallest model on ImageNet 512 (arXiv:2410.11081, table 5).
"""

from sdiff_jax import config
from sdiff_jax.interfaces import UserError


def get_config(words: str = ""):
  if words not in ("", "tiny"):
    raise UserError(f"configs/imagenet256_dit_scd.py:{words}: the only word is 'tiny'")
  c = config.base()
  c.teacher.config = "configs/imagenet256_dit_diffusion.py"
  c.teacher.workdir = "runs/imagenet256_dit_diffusion"
  c.data = config.use("data", "tfds", tfds_name="imagenet2012", image_size=256)
  c.model = config.use("models", "dit", patch=8, width=768, depth=12, heads=12)
  c.model.update(remat=True, dtype="bfloat16", attention="fused")
  c.loss = config.use("losses", "scm", velocity="teacher", p_mean=-0.8, p_std=1.6)
  c.train.update(steps=200_000, batch_size=256, flip=True, log_every=100)
  c.checkpoint.every = 5000
  c.optim.update(learning_rate=1e-4, b2=0.99)
  c.sampler.update(name="consistency", steps=2)
  c.evaluate.samplers = ("consistency/1", "consistency/2")
  if words == "tiny":
    c.teacher.config += ":tiny"
    c.teacher.workdir += "_tiny"
    c.data = config.use("data", "digits")
    c.model.update(patch=1, width=32, depth=2, heads=2)
    c.train.update(steps=4, batch_size=16, log_every=2)
    c.checkpoint.every = 4
  return c
