"""Images of LSUN Church by DDPM, many steps at a time (arXiv:2305.16317, 4.2).

  python -m sdiff_jax.main --config=configs/church.py --config.generate.folder=DIR

Variants: ddpm (the default) or ddim, with 1000 and 500 steps. DIR is a folder in the
diffusers format with an unconditional U-Net, such as google/ddpm-church-256.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants

# Sampler, steps, window, tolerance (the paper's; its unit is the noise of a step).
SAMPLERS = {
  "ddpm": ("paraddpm", 1000, 64, 0.5),
  "ddim": ("paraddim", 500, 40, 1e-3),
}


def get_config(variant: str = ""):
  (sampler,) = variants.parse(variant, SAMPLERS)
  name, steps, window, tolerance = SAMPLERS[sampler]
  c = config.base()
  c.job = "generate"
  c.generate.published = "google/ddpm-church-256"
  c.sampler.update(name=name, steps=steps, window=window, tolerance=tolerance)
  c.sample.update(num=16, batch_size=1)
  c.rehearse.program = "sample"
  c.evaluate.features = ""
  return c
