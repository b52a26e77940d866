"""Text to image by Flux.1, many steps at a time.

  python -m sdiff_jax.main --config=configs/flux.py \\
    --config.generate.folder=DIR --config.generate.prompts="a cat;a dog"

Variants: dev (the default) or schnell, with 28 and 4 steps. DIR is a folder in the
diffusers format, such as black-forest-labs/FLUX.1-dev. The guidance of dev is an input of
its network, config.generate.distilled_guidance; --config.sample.guidance adds
classifier-free guidance. For sequential sampling use --config.sampler.name=ddim.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants

# Steps, and the folder on the Hugging Face Hub.
MODELS = {"dev": (28, "FLUX.1-dev"), "schnell": (4, "FLUX.1-schnell")}


def get_config(variant: str = ""):
  (size,) = variants.parse(variant, MODELS)
  steps, name = MODELS[size]
  c = config.base()
  c.job = "generate"
  c.generate.update(published=f"black-forest-labs/{name}")
  c.generate.update(dtype="bfloat16", scan_blocks=True, distilled_guidance=3.5)
  c.sampler.update(name="paraddim", steps=steps, window=8, tolerance=0.1)
  if size == "schnell":
    c.sampler.window = 4
  c.sample.update(num=4, batch_size=1)
  c.rehearse.program = "sample"
  c.evaluate.features = ""
  return c
