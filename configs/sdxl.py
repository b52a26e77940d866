"""Text to image by Stable Diffusion XL, many steps at a time.

  python -m sdiff_jax.main --config=configs/sdxl.py \\
    --config.generate.folder=DIR --config.generate.prompts="a cat;a dog"

DIR is a folder in the diffusers format, such as stabilityai/stable-diffusion-xl-base-1.0.
For sequential sampling use --config.sampler.name=euler.
"""

from sdiff_jax import config


def get_config():
  c = config.base()
  c.job = "generate"
  published = "stabilityai/stable-diffusion-xl-base-1.0"
  c.generate.update(published=published, dtype="bfloat16", scan_blocks=True)
  c.sampler.update(name="paraeuler", steps=50, window=16, tolerance=0.1)
  c.sample.update(num=4, batch_size=1, guidance=5.0)
  c.rehearse.program = "sample"
  c.evaluate.features = ""
  return c
