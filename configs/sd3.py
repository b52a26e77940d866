"""Text to image by Stable Diffusion 3 or 3.5, many steps at a time.

  python -m sdiff_jax.main --config=configs/sd3.py \\
    --config.generate.folder=DIR --config.generate.prompts="a cat;a dog"

Variants: medium (the default) or large, with 40 and 28 steps. DIR is a folder in the
diffusers format, such as stabilityai/stable-diffusion-3.5-medium. For sequential sampling
use --config.sampler.name=ddim.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants

# Steps, guidance scale: those of the models' pages.
SIZES = {"medium": (40, 4.5), "large": (28, 3.5)}


def get_config(variant: str = ""):
  (size,) = variants.parse(variant, SIZES)
  steps, scale = SIZES[size]
  c = config.base()
  c.job = "generate"
  published = f"stabilityai/stable-diffusion-3.5-{size}"
  c.generate.update(published=published, dtype="bfloat16", scan_blocks=True)
  c.sampler.update(name="paraddim", steps=steps, window=8, tolerance=0.1)
  c.sample.update(num=4, batch_size=1, guidance=scale)
  c.rehearse.program = "sample"
  c.evaluate.features = ""
  return c
