"""Text to image by SANA, many steps at a time.

  python -m sdiff_jax.main --config=configs/sana.py \\
    --config.generate.folder=DIR --config.generate.prompts="a cat;a dog"

DIR is a folder in the diffusers format, such as
Efficient-Large-Model/Sana_1600M_1024px_diffusers, with a tokenizer.json. Diffusers sets an
instruction before every prompt, `complex_human_instruction`; give it as
config.generate.instruction. For sequential sampling use --config.sampler.name=dpmpp2m.
"""

from sdiff_jax import config


def get_config():
  c = config.base()
  c.job = "generate"
  published = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
  c.generate.update(published=published, dtype="bfloat16", scan_blocks=True)
  c.sampler.update(name="paradpmpp2m", steps=20, window=8, tolerance=0.1)
  c.sample.update(num=4, batch_size=1, guidance=4.5)
  c.rehearse.program = "sample"
  c.evaluate.features = ""
  return c
