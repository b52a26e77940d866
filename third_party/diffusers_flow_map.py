"""Makes tests/fixtures/flow_map_scheduler.npz: diffusers' scheduler of flow maps.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers
  /tmp/torch/bin/python third_party/diffusers_flow_map.py

The model is any function of the state and of both times; the scheduler runs in float64.
"""

import json
import pathlib

import numpy as np
import torch
from diffusers import FlowMapEulerDiscreteScheduler

FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "fixtures"
FILE = FOLDER / "flow_map_scheduler.npz"
# Settings, and the levels that are given in place of the scheduler's own.
RUNS = {
  **{f"plain_{n}": ({}, n, None) for n in (1, 2, 4, 8)},
  **{f"shift_{n}": ({"shift": 5.0}, n, None) for n in (2, 4, 8)},
  "levels": ({"shift": 3.0, "num_train_timesteps": 100}, 3, [0.9, 0.5, 0.2]),
}
# Settings whose last states are kept for 1 to 50 steps.
CONFIGS = {"plain": {}, "shift": {"shift": 5.0, "num_train_timesteps": 100}}
MOST = 50


def average_velocity(x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
  """Returns u(x, t, r) of the test."""
  return torch.sin(3 * x + 2 * t) * (1 + r) + x * (0.5 - t * r)


def run(z: np.ndarray, config: dict, steps: int, levels: list | None = None) -> tuple:
  """Returns the noise levels and all states of first states z."""
  scheduler = FlowMapEulerDiscreteScheduler(**config)
  scheduler.set_timesteps(steps, sigmas=levels)
  states = [torch.from_numpy(z)]
  for k, t in enumerate(scheduler.timesteps):
    u = average_velocity(states[-1], scheduler.sigmas[k], scheduler.sigmas[k + 1])
    states.append(scheduler.step(u, t, states[-1]).prev_sample)
  return scheduler.sigmas.numpy(), torch.stack(states, 1).numpy()


def main() -> None:
  z = np.random.default_rng(0).standard_normal((3, 4))
  arrays, about = {"z": z}, {}
  for name, (config, steps, levels) in RUNS.items():
    found = run(z, config, steps, levels)
    arrays[f"{name}/sigmas"], arrays[f"{name}/states"] = found
    about[name] = config | {"steps": steps}
  for name, config in CONFIGS.items():
    counts = range(1, MOST + 1)
    arrays[f"{name}/last"] = np.array([run(z, config, n)[1][:, -1] for n in counts])
  about_configs = json.dumps(CONFIGS)
  np.savez_compressed(FILE, **arrays, runs=json.dumps(about), configs=about_configs)
  print(f"{FILE}: {len(about)} runs, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
  main()
