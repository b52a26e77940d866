"""Makes tests/fixtures/more_schedulers.npz: schedulers of diffusers on a mixture.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers
  /tmp/torch/bin/python third_party/diffusers_schedulers.py

Euler's ancestral sampler, LCM, the grids of noise levels of Karras and others, and dynamic
thresholding. The model is the exact prediction for a mixture of Gaussians. The schedulers'
own code runs in float64, from alphas_cumprod of float64. Noise is a formula.
"""

import itertools
import json

import diffusers
import numpy as np
import torch
from diffusers import schedulers
from diffusers_euler import FILE, PROCESSES, RANGE, SPACINGS, abar, prediction

OUT = FILE.with_name("more_schedulers.npz")
SMALLEST = 2.0**-24
GRIDS = ("karras", "exponential")


class Wide:
  """The module torch or numpy with float64 in place of float32."""

  def __init__(self, module, wide):
    self._module, self.float32 = module, wide

  def __getattr__(self, name: str):
    return getattr(self._module, name)

  def prod(self, sizes: list) -> int:
    return int(np.prod(sizes))  # also of no sizes


def noise(i: int) -> np.ndarray:
  """Returns the noise of step i, [3, 4]; the test has the same formula."""
  return 2**0.5 * np.sin(1.7 * np.arange(12.0) + 0.9 * i).reshape(3, 4)


def run(mixture: dict, z: np.ndarray, name: str, config: dict, steps: int) -> tuple:
  """Returns the timesteps, and the last states of first states z."""
  scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
  levels = abar(config)
  levels[-1] = max(levels[-1], SMALLEST)
  scheduler.alphas_cumprod = torch.from_numpy(levels)
  scheduler.set_timesteps(steps)
  if hasattr(scheduler, "set_begin_index"):  # timesteps of some grids repeat
    scheduler.set_begin_index(0)
  ratios = (1 / levels - 1) ** 0.5
  x, count = torch.from_numpy(z) * float(scheduler.init_noise_sigma), 0

  def draw(*_, **__):
    nonlocal count
    count += 1
    return torch.from_numpy(noise(count - 1))

  for module in (schedulers.scheduling_euler_ancestral_discrete,
                 schedulers.scheduling_lcm, schedulers.scheduling_ddpm):  # fmt: skip
    module.randn_tensor = draw
  for i, t in enumerate(scheduler.timesteps):
    if hasattr(scheduler, "sigmas"):
      ratio = float(scheduler.sigmas[i])
    else:
      ratio = float(ratios[int(t)])
    alpha = (1 + ratio**2) ** -0.5
    scaled = scheduler.scale_model_input(x, t)
    y = prediction(mixture, config["prediction_type"], scaled, alpha, ratio * alpha)
    x = scheduler.step(y, t, x).prev_sample
  return scheduler.timesteps.numpy(), x.numpy()


def main() -> None:
  torch.set_default_dtype(torch.float64)
  for name in ("euler_discrete", "euler_ancestral_discrete", "unipc_multistep",
               "dpmsolver_multistep", "lcm", "ddim", "ddpm"):  # fmt: skip
    module = getattr(schedulers, f"scheduling_{name}")
    module.torch, module.np = Wide(torch, torch.float64), Wide(np, np.float64)
  rng = np.random.default_rng(0)
  mixture = {
    "means": rng.uniform(-1, 1, (3, 4)),
    "stds": np.array([0.1, 0.3, 0.5]),
    "weights": np.array([0.5, 0.3, 0.2]),
  }
  z = rng.standard_normal((3, 4))
  arrays, runs = {**mixture, "z": z}, {}

  def keep(name: str, cls: str, config: dict, steps: int) -> None:
    timesteps, final = run(mixture, z, cls, config, steps)
    assert np.isfinite(final).all(), name
    if steps <= 50:
      arrays[f"{name}/timesteps"] = timesteps
    arrays[f"{name}/final"] = final
    runs[name] = {"class": cls, "config": config, "steps": steps}

  for (schedule, T), kind in itertools.product(PROCESSES, ("epsilon", "v_prediction")):
    common = RANGE | {"beta_schedule": schedule, "num_train_timesteps": T}
    common |= {"prediction_type": kind}
    for spacing, steps in itertools.product(SPACINGS, (1, 2, 7, 10, 50, T)):
      config = common | {"timestep_spacing": spacing}
      name = f"ancestral/{schedule}_{spacing}_{kind}_{steps}"
      keep(name, "EulerAncestralDiscrete", config, steps)
    for steps in (1, 2, 3, 4, 8, 50):
      config = common | {"original_inference_steps": 50}
      keep(f"lcm/{schedule}_{kind}_{steps}", "LCM", config, steps)
    for grid, steps in itertools.product(GRIDS, (1, 2, 10, 25)):
      config = common | {f"use_{grid}_sigmas": True}
      spacings = SPACINGS if steps == 10 else ("linspace",)
      for cls, spacing in itertools.product(
        ("EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"), spacings
      ):
        name = f"{grid}/{cls}_{schedule}_{spacing}_{kind}_{steps}"
        keep(name, cls, config | {"timestep_spacing": spacing}, steps)
    keep(f"karras/Euler_{schedule}_{kind}_{T}", "EulerDiscrete",
         common | {"use_karras_sigmas": True}, T)  # fmt: skip
    least = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    for cls in ("DPMSolverMultistep", "UniPCMultistep"):
      keep(f"karras/least_{cls}_{schedule}_{kind}", cls, common | least, 20)
    for cls, most in itertools.product(
      ("DDIM", "DDPM", "DPMSolverMultistep", "UniPCMultistep", "LCM"), (1.0, 1.1)
    ):
      config = common | {"thresholding": True, "dynamic_thresholding_ratio": 0.8}
      config |= {"sample_max_value": most}
      name = f"dynamic/{cls}_{schedule}_{kind}_{most}"
      keep(name, cls, config, 10)
  np.savez_compressed(OUT, **arrays, runs=json.dumps(runs))
  print(f"{OUT}: {len(runs)} runs, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
  main()
