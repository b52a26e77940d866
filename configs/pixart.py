"""Text to image by PixArt-alpha or PixArt-sigma, many steps at a time.

  python -m sdiff_jax.main --config=configs/pixart.py \\
    --config.generate.folder=DIR --config.generate.prompts="a cat;a dog"

Variants: alpha (the default) or sigma. DIR is a folder in the diffusers format, such as
PixArt-alpha/PixArt-XL-2-1024-MS, with a tokenizer.json. For sequential sampling use
--config.sampler.name=dpmpp2m.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants

FOLDERS = {
  "alpha": "PixArt-alpha/PixArt-XL-2-1024-MS",
  "sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
}


def get_config(variant: str = ""):
  (name,) = variants.parse(variant, FOLDERS)
  c = config.base()
  c.job = "generate"
  c.generate.update(published=FOLDERS[name], dtype="bfloat16", scan_blocks=True)
  c.sampler.update(name="paradpmpp2m", steps=20, window=8, tolerance=0.1)
  c.sample.update(num=4, batch_size=1, guidance=4.5)
  c.rehearse.program = "sample"
  c.evaluate.features = ""
  return c
