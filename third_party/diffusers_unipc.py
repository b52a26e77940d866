"""Makes tests/fixtures/unipc.npz: diffusers' UniPCMultistepScheduler on exact models.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers
  /tmp/torch/bin/python third_party/diffusers_unipc.py

The model is the exact noise prediction for a mixture of Gaussians. The scheduler's own
code runs in float64: its noise levels are computed again in float64 at the timesteps
that it chooses.
"""

import itertools
import json
import pathlib

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

FILE = pathlib.Path(__file__).parents[1] / "tests" / "fixtures" / "unipc.npz"
RANGE = {"beta_start": 0.00085, "beta_end": 0.012}
PROCESSES = (("squaredcos_cap_v2", 100), ("scaled_linear", 1000))


def abar(schedule: str, steps: int) -> np.ndarray:
  """Returns alpha^2 at each timestep, float64 [steps]."""
  if schedule == "squaredcos_cap_v2":
    at = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - at[1:] / at[:-1], 0.999))
  start, end = RANGE.values()
  return np.cumprod(1 - np.linspace(start**0.5, end**0.5, steps) ** 2)


def noise_prediction(mixture: dict, x: torch.Tensor, level: float) -> torch.Tensor:
  """Returns E[eps | x] for x = level^(1/2) x0 + (1 - level)^(1/2) eps, [S, D]."""
  means, stds, weights = (torch.from_numpy(v) for v in mixture.values())
  alpha, sigma = level**0.5, (1 - level) ** 0.5
  var = (alpha * stds) ** 2 + sigma**2
  residual = x[:, None] - alpha * means
  log = torch.log(weights) - 0.5 * (residual**2).sum(-1) / var
  share = torch.softmax(log - 0.5 * x.shape[1] * torch.log(var), dim=1)
  return sigma * (share[..., None] * residual / var[:, None]).sum(1)


def run(mixture: dict, x: np.ndarray, config: dict, steps: int) -> tuple:
  """Returns the timesteps and the states of a scheduler, float64 [steps + 1, S, D]."""
  scheduler = UniPCMultistepScheduler(**config)
  scheduler.set_timesteps(steps)
  levels = abar(config["beta_schedule"], config["num_train_timesteps"])
  timesteps = scheduler.timesteps.numpy()
  final = 0.0
  if config["final_sigmas_type"] == "sigma_min":
    final = (1 / levels[0] - 1) ** 0.5
  sigmas = np.append((1 / levels[timesteps] - 1) ** 0.5, final)
  np.testing.assert_allclose(scheduler.sigmas.numpy(), sigmas, rtol=2e-4)
  scheduler.sigmas = torch.from_numpy(sigmas)
  states = [torch.from_numpy(x)]
  for t in scheduler.timesteps:
    prediction = noise_prediction(mixture, states[-1], levels[t])
    states.append(scheduler.step(prediction, t, states[-1]).prev_sample)
  return timesteps, torch.stack(states).numpy()


def main() -> None:
  torch.set_default_dtype(torch.float64)
  rng = np.random.default_rng(0)
  mixture = {
    "means": rng.uniform(-1, 1, (3, 4)),
    "stds": np.array([0.1, 0.3, 0.5]),
    "weights": np.array([0.5, 0.3, 0.2]),
  }
  x = rng.standard_normal((3, 4))
  arrays, runs = {**mixture, "x_init": x}, {}
  grids = itertools.chain(
    itertools.product(PROCESSES, (5, 10, 20), (1, 2, 3), ("bh1", "bh2"), ["linspace"]),
    itertools.product(PROCESSES, (12,), (2, 3), ("bh2",), ("leading", "trailing")),
  )
  for (schedule, train_steps), steps, order, variant, spacing in grids:
    # The scheduler returns NaN for bh1 with a last step to clean data.
    for final in ("zero", "sigma_min")[variant == "bh1" :]:
      config = RANGE | {
        "beta_schedule": schedule,
        "num_train_timesteps": train_steps,
        "solver_order": order,
        "solver_type": variant,
        "timestep_spacing": spacing,
        "final_sigmas_type": final,
      }
      name = f"{schedule}_{steps}_{order}_{variant}_{spacing}_{final}"
      timesteps, states = run(mixture, x, config, steps)
      assert np.isfinite(states).all(), name
      arrays[f"{name}/timesteps"], arrays[f"{name}/final"] = timesteps, states[-1]
      runs[name] = {"config": config, "steps": steps}
  np.savez_compressed(FILE, **arrays, runs=json.dumps(runs))
  print(f"{FILE}: {len(runs)} runs, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
  main()
