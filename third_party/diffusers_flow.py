"""Makes tests/fixtures/flow_scheduler.npz: diffusers' scheduler of flow matching.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers
  /tmp/torch/bin/python third_party/diffusers_flow.py

The model is the exact velocity for a mixture of Gaussians. The scheduler's own code runs
in float64; what it rounds to float32 inside NumPy, the levels that a pipeline gives it,
stays rounded.
"""

import json
import pathlib

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers import scheduling_flow_match_euler_discrete as module

FILE = pathlib.Path(__file__).parents[1] / "tests" / "fixtures" / "flow_scheduler.npz"
STEPS = (1, 2, 3, 10, 28, 50, 1000)
DYNAMIC = {"use_dynamic_shifting": True}
GRIDS = ("karras", "exponential")
# Settings -> with levels of the pipeline of Flux in place of the scheduler's own.
CONFIGS = {
  "plain": {},
  "sd3": {"shift": 3.0},
  "short": {"shift": 0.5, "num_train_timesteps": 100},
  "dynamic": DYNAMIC | {"base_shift": 0.5, "max_shift": 1.16},
  "linear": DYNAMIC | {"time_shift_type": "linear", "base_image_seq_len": 16},
  "terminal": DYNAMIC | {"shift_terminal": 0.1, "max_image_seq_len": 8192},
  **{grid: {"shift": 3.0, f"use_{grid}_sigmas": True} for grid in GRIDS},
}
TOKENS = (256, 1024, 4096)


class Float64:
  """The module `torch` for a scheduler that rounds to float32."""

  float32 = torch.float64

  def __getattr__(self, name: str):
    return getattr(torch, name)


def velocity(mixture: dict, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
  """Returns E[eps - x0 | x] for x = (1 - sigma) x0 + sigma eps, [S, D]."""
  means, stds, weights = (torch.from_numpy(v) for v in mixture.values())
  alpha = 1 - sigma
  var = (alpha * stds) ** 2 + sigma**2
  residual = x[:, None] - alpha * means
  log = torch.log(weights) - 0.5 * (residual**2).sum(-1) / var
  share = torch.softmax(log - 0.5 * x.shape[1] * torch.log(var), dim=1)
  eps = sigma * (share[..., None] * residual / var[:, None]).sum(1)
  pull = (alpha * stds**2 / var)[:, None]
  return eps - (share[..., None] * (means + pull * residual)).sum(1)


def main() -> None:
  torch.set_default_dtype(torch.float64)
  module.torch = Float64()
  rng = np.random.default_rng(0)
  mixture = {
    "means": rng.uniform(-1, 1, (3, 4)),
    "stds": np.array([0.1, 0.3, 0.5]),
    "weights": np.array([0.5, 0.3, 0.2]),
  }
  z = rng.standard_normal((3, 4))
  arrays, runs = {**mixture, "z": z}, {}
  for name, config in CONFIGS.items():
    for tokens in TOKENS if "use_dynamic_shifting" in config else (0,):
      for spacing in ("linspace", "trailing"):
        for steps in STEPS:
          scheduler = FlowMatchEulerDiscreteScheduler(**config)
          c = scheduler.config
          keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
          given = {"mu": calculate_shift(tokens, *(c[k] for k in keys))}
          if spacing == "trailing":
            given["sigmas"] = np.linspace(1.0, 1 / steps, steps)
          scheduler.set_timesteps(steps, **given)
          if not torch.isfinite(scheduler.sigmas).all():
            continue
          x = torch.from_numpy(z)
          for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            x = scheduler.step(velocity(mixture, x, sigma), t, x).prev_sample
          run = f"{name}_{tokens}_{spacing}_{steps}"
          every = 1 if steps <= 50 else 37
          arrays[f"{run}/timesteps"] = scheduler.timesteps.numpy()[::every]
          arrays[f"{run}/final"] = x.numpy()
          about = {"config": config, "tokens": tokens, "steps": steps}
          runs[run] = about | {"spacing": spacing, "every": every}
  np.savez_compressed(FILE, **arrays, runs=json.dumps(runs))
  print(f"{FILE}: {len(runs)} runs, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
  main()
