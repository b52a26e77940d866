"""Makes tests/fixtures/sigma_grids.npz: beta and Lu noise levels of diffusers.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy scipy diffusers
  /tmp/torch/bin/python third_party/diffusers_grids.py

As in diffusers_schedulers.py and diffusers_flow.py, whose mixture and noise these are.
"""

import itertools
import json

import diffusers_flow
import diffusers_schedulers as peers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, schedulers
from diffusers_euler import PROCESSES, RANGE, SPACINGS

OUT = peers.OUT.with_name("sigma_grids.npz")
FIELDS = {"beta": "use_beta_sigmas", "lu": "use_lu_lambdas"}
CLASSES = {
  "beta": ("EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"),
  "lu": ("DPMSolverMultistep",),
}
STEPS = (1, 2, 10, 28, 50)


def flow(mixture: dict, z: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the timesteps and the end states of flow matching with beta levels."""
  scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_beta_sigmas=True)
  scheduler.set_timesteps(steps)
  x = torch.from_numpy(z)
  for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
    x = scheduler.step(diffusers_flow.velocity(mixture, x, sigma), t, x).prev_sample
  return scheduler.timesteps.numpy(), x.numpy()


def main() -> None:
  torch.set_default_dtype(torch.float64)
  diffusers_flow.module.torch = diffusers_flow.Float64()
  for name in ("euler_discrete", "unipc_multistep", "dpmsolver_multistep"):
    module = getattr(schedulers, f"scheduling_{name}")
    module.torch = peers.Wide(torch, torch.float64)
    module.np = peers.Wide(np, np.float64)
  rng = np.random.default_rng(0)
  mixture = {
    "means": rng.uniform(-1, 1, (3, 4)),
    "stds": np.array([0.1, 0.3, 0.5]),
    "weights": np.array([0.5, 0.3, 0.2]),
  }
  z = rng.standard_normal((3, 4))
  arrays, runs = {**mixture, "z": z}, {}
  for (schedule, T), grid in itertools.product(PROCESSES, FIELDS):
    for cls, steps in itertools.product(CLASSES[grid], STEPS):
      for spacing in SPACINGS if steps == 10 else ("linspace",):
        config = RANGE | {"beta_schedule": schedule, "num_train_timesteps": T}
        config |= {"prediction_type": "epsilon", "timestep_spacing": spacing}
        config[FIELDS[grid]] = True
        timesteps, final = peers.run(mixture, z, cls, config, steps)
        name = f"{grid}/{cls}_{schedule}_{spacing}_{steps}"
        assert np.isfinite(final).all(), name
        arrays[f"{name}/timesteps"], arrays[f"{name}/final"] = timesteps, final
        runs[name] = {"class": cls, "config": config, "steps": steps}
  for steps in STEPS:
    found = flow(mixture, z, steps)
    arrays[f"flow_{steps}/timesteps"], arrays[f"flow_{steps}/final"] = found
  arrays["flow_steps"] = np.array(STEPS)
  np.savez_compressed(OUT, **arrays, runs=json.dumps(runs))
  print(f"{OUT}: {len(runs)} runs, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
  main()
