"""Makes tests/fixtures/dpm_solver.npz: the last steps of diffusers' DPM-Solver++.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers
  /tmp/torch/bin/python third_party/diffusers_dpm_solver.py

Orders 2 and 3, with few steps and many, of all steps and of the last ones, with the
fields that say which order the last steps have; on a process with betas and on that of
flow matching. The model is the exact prediction for a mixture of Gaussians. The
scheduler's own code runs in float64.
"""

import itertools
import json

import diffusers_flow
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_dpmsolver_multistep as module
from diffusers_euler import RANGE, abar, prediction
from diffusers_schedulers import OUT, Wide, noise

FILE = OUT.with_name("dpm_solver.npz")
BETAS = RANGE | {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW |= {"flow_shift": 3.0}
# Number of all steps -> how many of the last ones are taken.
STEPS = {
  1: (1,),
  2: (2,),
  3: (3, 2),
  10: (10, 6),
  14: (14, 5),
  15: (15, 5),
  20: (20, 7),
}


def run(mixture: dict, x0, z, config: dict, steps: int, taken: int) -> np.ndarray:
  """Returns the last states, from noise z alone or from x0 noised by it."""
  scheduler = DPMSolverMultistepScheduler(**config)
  flow = "use_flow_sigmas" in config
  if not flow:
    scheduler.alphas_cumprod = torch.from_numpy(abar(config))
  scheduler.set_timesteps(steps)
  scheduler.set_begin_index(steps - taken)
  timesteps, x = scheduler.timesteps[steps - taken :], torch.from_numpy(z)
  if taken < steps:
    x = scheduler.add_noise(torch.from_numpy(x0), x, timesteps[:1].repeat(len(z)))
  count = 0

  def draw(*_, **__) -> torch.Tensor:
    nonlocal count
    count += 1
    return torch.from_numpy(noise(count - 1))

  module.randn_tensor = draw
  for i, t in enumerate(timesteps):
    sigma = scheduler.sigmas[steps - taken + i]
    if flow:
      y = diffusers_flow.velocity(mixture, x, sigma)
    else:
      alpha = float((1 + sigma**2) ** -0.5)
      y = prediction(mixture, "epsilon", x, alpha, float(sigma) * alpha)
    x = scheduler.step(y, t, x).prev_sample
  return x.numpy()


def configs() -> list[dict]:
  """Returns the configs of all orders and ends that are not the same by definition."""
  ends = itertools.product((True, False), (True, False))
  fields = [{"lower_order_final": a, "euler_at_final": b} for a, b in ends]
  orders = [{"solver_order": 2}, {"solver_order": 3}]
  orders += [{"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}]
  found = [
    BETAS | order | end | {"final_sigmas_type": last}
    for order, end, last in itertools.product(orders, fields, ("zero", "sigma_min"))
  ]
  return found + [FLOW | orders[1] | end for end in fields]


def main() -> None:
  torch.set_default_dtype(torch.float64)
  module.torch, module.np = Wide(torch, torch.float64), Wide(np, np.float64)
  rng = np.random.default_rng(0)
  mixture = {
    "means": rng.uniform(-1, 1, (3, 4)),
    "stds": np.array([0.1, 0.3, 0.5]),
    "weights": np.array([0.5, 0.3, 0.2]),
  }
  x0, z = rng.uniform(-1, 1, (3, 4)), rng.standard_normal((3, 4))
  finals, runs = [], []
  for config, steps in itertools.product(configs(), STEPS):
    for taken in STEPS[steps]:
      finals.append(run(mixture, x0, z, config, steps, taken))
      runs.append({"config": config, "steps": steps, "taken": taken})
  assert np.isfinite(finals).all()
  arrays = {**mixture, "x0": x0, "z": z, "finals": np.array(finals)}
  np.savez_compressed(FILE, **arrays, runs=json.dumps(runs))
  print(f"{FILE}: {len(runs)} runs, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
  main()
