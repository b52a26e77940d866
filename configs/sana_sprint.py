"""Text to image by SANA-Sprint in two steps, a distilled consistency model.

  python -m sdiff_jax.main --config=configs/sana_sprint.py \\
    --config.generate.folder=DIR --config.generate.prompts="a cat;a dog"

DIR is a folder in the diffusers format, such as
Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers, with a tokenizer.json. The guidance
is an input of the network, config.generate.distilled_guidance. configs/sana.py says what
config.generate.instruction is. --config.sampler.steps=1 and 4 work, too.
"""

from sdiff_jax import config


def get_config():
  c = config.base()
  c.job = "generate"
  published = "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers"
  c.generate.update(
    published=published, dtype="bfloat16", scan_blocks=True, distilled_guidance=4.5
  )
  c.sampler.update(name="consistency", steps=2)
  c.sample.update(num=4, batch_size=1)
  c.rehearse.program = "sample"
  c.evaluate.features = ""
  return c
