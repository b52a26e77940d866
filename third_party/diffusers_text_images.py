"""Samples a folder of diffusers for many prompts.

  PYTHON-WITH-TORCH-AND-DIFFUSERS third_party/diffusers_text_images.py FOLDER PROMPTS OUT \
    STEPS

PROMPTS is a file of one prompt a line. STEPS is a number of steps, or the timesteps of them,
such as 999,580. Writes an image for each of them, as uint8
[N, H, W, C], to OUT, an .npz. For pipelines without an autoencoder, whose latents are
pixels in [-1, 1].
"""

import pathlib
import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline

BATCH = 250


@torch.inference_mode()
def main() -> None:
  folder, prompts, out, steps = sys.argv[1:]
  texts = pathlib.Path(prompts).read_text("utf-8").splitlines()
  without = dict.fromkeys(("vae", "safety_checker", "feature_extractor"))
  pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **without)
  pipe.set_progress_bar_config(disable=True)
  side = pipe.unet.config.sample_size * pipe.vae_scale_factor
  options = {"height": side, "width": side, "output_type": "latent"}
  numbers = [int(number) for number in steps.split(",")]
  chosen = (
    {"timesteps": numbers} if numbers[1:] else {"num_inference_steps": numbers[0]}
  )
  options |= {"guidance_scale": 1.0, **chosen}
  images, generator = [], torch.Generator().manual_seed(0)
  for begin in range(0, len(texts), BATCH):
    batch = texts[begin : begin + BATCH]
    x = pipe(batch, generator=generator, **options).images
    pixels = torch.round((x.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    images.append(pixels.permute(0, 2, 3, 1).numpy())
    print(f"{begin + len(batch)}/{len(texts)}", flush=True)
  np.savez(out, images=np.concatenate(images))


if __name__ == "__main__":
  main()
