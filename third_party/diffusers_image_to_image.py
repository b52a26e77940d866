"""Makes tests/fixtures/image_to_image.npz: pipelines and schedulers from noised images.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers transformers tokenizers
  /tmp/torch/bin/python third_party/diffusers_image_to_image.py

Pipelines of the folders in tests/fixtures, in float32, from an image, a strength and
given noise. Schedulers start from noised data and follow the exact prediction for a
mixture of Gaussians; their own code runs in float64, with noise that is a formula.
"""

import itertools
import json

import diffusers
import numpy as np
import torch
from diffusers import schedulers
from diffusers.models.autoencoders import vae
from diffusers_euler import RANGE, abar, prediction
from diffusers_folders import FIXTURES, NEGATIVE, PROMPT
from diffusers_schedulers import Wide, noise

OUT = FIXTURES / "image_to_image.npz"
STEPS, STRENGTH = 10, 0.75  # pipelines round 7.5 steps down, or up
PIPELINES = {
  "tiny-sd2": (diffusers.StableDiffusionImg2ImgPipeline, {"negative_prompt": NEGATIVE}),
  "tiny-sdxl": (
    diffusers.StableDiffusionXLImg2ImgPipeline,
    {"negative_prompt": NEGATIVE},
  ),
  "tiny-sd3": (
    diffusers.StableDiffusion3Img2ImgPipeline,
    {"negative_prompt": NEGATIVE},
  ),
  "tiny-flux": (diffusers.FluxImg2ImgPipeline, {}),
}
SCHEDULERS = (
  ("DDIM", {}),
  ("DDPM", {}),
  ("EulerDiscrete", {"timestep_spacing": "leading"}),
  ("EulerDiscrete", {"use_karras_sigmas": True}),
  ("EulerAncestralDiscrete", {}),
  ("DPMSolverMultistep", {}),
  ("DPMSolverMultistep", {"timestep_spacing": "trailing", "use_karras_sigmas": True}),
  ("UniPCMultistep", {}),
  ("LCM", {"original_inference_steps": 50}),
)


def pipeline(name: str, x: dict) -> dict:
  """Returns the last latents of a folder's pipeline from an image."""
  kind, options = PIPELINES[name]
  pipe = kind.from_pretrained(FIXTURES / name, variant=None if name == "tiny-sd2" else
                              "fp16", torch_dtype=torch.float32)  # fmt: skip
  pipe.set_progress_bar_config(disable=True)
  draws = [x["eps"], x["z"]]

  def draw(shape, **_) -> torch.Tensor:
    return draws.pop(0).reshape(shape)

  module = __import__(kind.__module__, fromlist=["randn_tensor"])
  vae.randn_tensor = module.randn_tensor = draw
  height, width = x["image"].shape[:2]
  image = torch.from_numpy(x["image"] / 255.0).float().permute(2, 0, 1)[None]
  size = {} if name in ("tiny-sd2", "tiny-sdxl") else {"height": height, "width": width}
  out = pipe(
    PROMPT, image=image, strength=STRENGTH, num_inference_steps=STEPS,
    guidance_scale=5.0, output_type="latent", **size, **options,
  ).images  # fmt: skip
  assert not draws
  if name == "tiny-flux":
    out = pipe._unpack_latents(out, height, width, 2)
  return {"latents_out": out.numpy()}


def follow(
  mixture: dict, x0, z, name: str, config: dict, steps: int, strength
) -> tuple:
  """Returns the timesteps, and the last states from x0 noised by z."""
  scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
  levels = abar(config)
  scheduler.alphas_cumprod = torch.from_numpy(levels)
  scheduler.set_timesteps(steps)
  first = steps - min(int(steps * strength), steps)
  timesteps = scheduler.timesteps[first:]
  if hasattr(scheduler, "set_begin_index"):
    scheduler.set_begin_index(first)
  start = timesteps[:1].repeat(len(z))
  x = scheduler.add_noise(torch.from_numpy(x0), torch.from_numpy(z), start)
  ratios, count = (1 / levels - 1) ** 0.5, 0

  def draw(*_, **__):
    nonlocal count
    count += 1
    return torch.from_numpy(noise(count - 1))

  for module in (schedulers.scheduling_euler_ancestral_discrete,
                 schedulers.scheduling_lcm, schedulers.scheduling_ddpm):  # fmt: skip
    module.randn_tensor = draw
  for i, t in enumerate(timesteps):
    sigmas = getattr(scheduler, "sigmas", None)
    ratio = float(ratios[int(t)]) if sigmas is None else float(sigmas[first + i])
    alpha = (1 + ratio**2) ** -0.5
    scaled = scheduler.scale_model_input(x, t)
    y = prediction(mixture, "epsilon", scaled, alpha, ratio * alpha)
    x = scheduler.step(y, t, x).prev_sample
  return timesteps.numpy(), x.numpy()


def main() -> None:
  rng = np.random.default_rng(0)
  arrays: dict = {}
  for name in PIPELINES:
    channels, h, w = {"tiny-sd3": (16, 8, 8)}.get(name, (4, 8, 12))
    x = {"eps": torch.randn(1, channels, h, w), "z": torch.randn(1, channels, h, w)}
    x["image"] = rng.integers(0, 256, (2 * h, 2 * w, 3), dtype=np.uint8)
    arrays |= {f"{name}/{k}": np.asarray(v) for k, v in x.items()}
    with torch.no_grad():
      arrays |= {f"{name}/{k}": v for k, v in pipeline(name, x).items()}
    print(name, np.abs(arrays[f"{name}/latents_out"]).max())
  meta = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 5.0}
  arrays["meta"] = json.dumps(meta | {"steps": STEPS, "strength": STRENGTH})

  torch.set_default_dtype(torch.float64)
  for name in ("euler_discrete", "euler_ancestral_discrete", "unipc_multistep",
               "dpmsolver_multistep", "lcm", "ddim", "ddpm"):  # fmt: skip
    module = getattr(schedulers, f"scheduling_{name}")
    module.torch, module.np = Wide(torch, torch.float64), Wide(np, np.float64)
  mixture = {
    "means": rng.uniform(-1, 1, (3, 4)),
    "stds": np.array([0.1, 0.3, 0.5]),
    "weights": np.array([0.5, 0.3, 0.2]),
  }
  x0, z, runs = rng.uniform(-1, 1, (3, 4)), rng.standard_normal((3, 4)), {}
  arrays |= {**mixture, "x0": x0, "noise": z}
  common = RANGE | {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
  common["num_train_timesteps"] = 1000
  for (name, options), (steps, strength) in itertools.product(
    SCHEDULERS, ((10, 0.75), (10, 0.1), (20, 0.3), (50, 0.58), (7, 1.0))
  ):
    label = f"{name}_{'_'.join(options)}_{steps}_{strength}"
    config = common | options
    if name in ("DDIM", "DDPM", "LCM"):
      config["clip_sample"] = False
    found = follow(mixture, x0, z, name, config, steps, strength)
    assert np.isfinite(found[1]).all(), label
    arrays[f"{label}/timesteps"], arrays[f"{label}/final"] = found
    runs[label] = {"class": name, "config": config, "steps": steps}
    runs[label]["strength"] = strength
  arrays["runs"] = json.dumps(runs)
  np.savez_compressed(OUT, **arrays)
  print(f"{OUT}: {len(runs)} runs, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
  torch.manual_seed(0)
  main()
