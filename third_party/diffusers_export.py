"""Makes tests/fixtures/diffusers_export.npz: images of exported folders by diffusers.

  PYTHONPATH=tests python tests/exported.py /tmp/exported   # our own environment
  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers transformers
  /tmp/torch/bin/python third_party/diffusers_export.py /tmp/exported

Each folder is loaded as it is and sampled in 1, 2 and 4 steps; all noise is given.
"""

import json
import pathlib
import sys

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.pipelines.dit import pipeline_dit
from diffusers.schedulers import (
  scheduling_flow_match_euler_discrete,
  scheduling_lcm,
  scheduling_scm,
)

SANA = (diffusers.SanaPipeline, diffusers.SanaSprintPipeline)
FILE = pathlib.Path(__file__).parents[1] / "tests/fixtures/diffusers_export.npz"
PROMPT = "a cat on the mat"
# Of the latents; 8 for others.
SIDES = dict.fromkeys(("sana", "sana-sprint", "sana-unguided"), 16)
MODULES = (pipeline_ddpm, pipeline_dit, scheduling_lcm)
MODULES += (scheduling_flow_match_euler_discrete, scheduling_scm)
ARGUMENTS = {
  "DDPMPipeline": {"batch_size": 1},
  "DiTPipeline": {"class_labels": [1], "guidance_scale": 1.0},
  "StableDiffusionPipeline": {"prompt": PROMPT, "guidance_scale": 1.0},
  "StableDiffusionXLPipeline": {"prompt": PROMPT, "guidance_scale": 1.0},
  "StableDiffusion3Pipeline": {"prompt": PROMPT, "guidance_scale": 1.0},
  "SanaPipeline": {
    "prompt": PROMPT,
    "guidance_scale": 1.0,
    "use_resolution_binning": False,
    "clean_caption": False,
    "complex_human_instruction": None,
  },
  "SanaSprintPipeline": {
    "prompt": PROMPT,
    "guidance_scale": 4.5,
    "use_resolution_binning": False,
    "clean_caption": False,
    "complex_human_instruction": None,
  },
  "PixArtAlphaPipeline": {
    "prompt": PROMPT,
    "guidance_scale": 1.0,
    "use_resolution_binning": False,
    "clean_caption": False,
  },
}


def run(
  folder: pathlib.Path, steps: int, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the image of a folder, uint8 [H, W, C], and its sample [C, H, W].

  The noise of the first state and of the steps is [N, 1, C, H, W].
  """
  pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
  pipe.set_progress_bar_config(disable=True)
  if isinstance(pipe, SANA):
    # transformers gives Gemma's class the rules of Gemma's vocabulary, and this small one
    # has others, which tokenizer.json says.
    file = str(folder / "tokenizer" / "tokenizer.json")
    options = {"tokenizer_file": file, "pad_token": "<pad>", "padding_side": "right"}
    pipe.tokenizer = transformers.PreTrainedTokenizerFast(**options)
  given = iter([*torch.from_numpy(noise), *torch.zeros(1, *noise.shape[1:])])
  for module in MODULES:
    module.randn_tensor = lambda shape, **_: next(given)
  options = ARGUMENTS[type(pipe).__name__] | {"num_inference_steps": steps}
  if folder.name == "sd2-guided":
    options["guidance_scale"] = 4.5
  if "prompt" in options:
    scale = pipe.vae_scale_factor
    if isinstance(pipe, diffusers.SanaSprintPipeline) and steps != 2:
      options["intermediate_timesteps"] = None
    side = scale * noise.shape[-1]
    options |= {"latents": next(given), "height": side, "width": side}
  step, states = pipe.scheduler.step, []

  def recorded(*args, **kwargs):
    out = step(*args, **kwargs)
    states.append(out[0] if isinstance(out, tuple) else out.prev_sample)
    return out

  pipe.scheduler.step = recorded
  image = pipe(output_type="np", **options).images[0]
  unit = pipe.scheduler.config.get("sigma_data", 1.0)
  return np.round(255 * image).astype(np.uint8), states[-1][0].numpy() / unit


def main() -> None:
  with np.load(FILE) as stored:
    arrays = dict(stored)  # of other folders
  for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    rng = np.random.default_rng([*folder.name.encode()])
    index = json.loads((folder / "model_index.json").read_text())
    part = folder / ("unet" if "unet" in index else "transformer") / "config.json"
    channels = json.loads(part.read_text())["in_channels"]
    file = folder / "scheduler" / "scheduler_config.json"
    arrays[f"{folder.name}/scheduler"] = np.array(file.read_text())
    arrays[f"{folder.name}/pipeline"] = np.array(index["_class_name"])
    for steps in (1, 2, 4):
      shape = (steps, 1, channels, *2 * (SIDES.get(folder.name, 8),))
      noise = rng.standard_normal(shape, np.float32).astype(np.float16)
      name = f"{folder.name}/{steps}"
      arrays[f"{name}/noise"] = np.moveaxis(noise, 2, -1)
      arrays[f"{name}/image"], x = run(folder, steps, noise.astype(np.float32))
      arrays[f"{name}/sample"] = np.moveaxis(x, 0, -1)
      print(name, arrays[f"{name}/image"].std(), x.std())
  np.savez_compressed(FILE, **arrays)
  print(f"{FILE}: {FILE.stat().st_size} bytes, diffusers {diffusers.__version__}")


if __name__ == "__main__":
  with torch.no_grad():
    main()
