"""Images of ImageNet's classes by DiT-XL/2 at 256 x 256, many steps at a time.

  python -m sdiff_jax.main --config=configs/dit256.py \\
    --config.generate.folder=hf://facebook/DiT-XL-2-256 \\
    --config.generate.labels="golden retriever;white shark"

Variants: ddim (the default) or ddpm, with 250 steps each. Labels are names of classes or
their numbers; without them, images have all classes in turn. For sequential sampling use
--config.sampler.name=ddim.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants

# Sampler, window; 250 steps and guidance 4 are those of the model's page.
SAMPLERS = {"ddim": ("paraddim", 32), "ddpm": ("paraddpm", 48)}


def get_config(variant: str = ""):
  (sampler,) = variants.parse(variant, SAMPLERS)
  name, window = SAMPLERS[sampler]
  c = config.base()
  c.job = "generate"
  published = "facebook/DiT-XL-2-256"
  c.generate.update(published=published, dtype="bfloat16", scan_blocks=True)
  c.sampler.update(name=name, steps=250, window=window, tolerance=0.1)
  c.sample.update(num=4, batch_size=1, guidance=4.0)
  c.rehearse.program = "sample"
  c.evaluate.features = ""
  return c
