"""Makes tests/fixtures/euler.npz: diffusers' Euler, and its zero terminal SNR.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers
  /tmp/torch/bin/python third_party/diffusers_euler.py

The model is the exact prediction for a mixture of Gaussians. The schedulers' own code
runs in float64: their noise levels are computed again in float64 at the timesteps that
they choose, and are compared with their own float32 levels.
"""

import itertools
import json
import pathlib

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_euler_discrete

FILE = pathlib.Path(__file__).parents[1] / "tests" / "fixtures" / "euler.npz"
RANGE = {"beta_start": 0.00085, "beta_end": 0.012}
PROCESSES = (("squaredcos_cap_v2", 100), ("scaled_linear", 1000))
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SMALLEST = 2.0**-24  # alpha^2 of pure noise in diffusers' multistep schedulers


class Float64:
  """The module `torch` for a scheduler that rounds its states to float32."""

  float32 = torch.float64

  def __getattr__(self, name: str):
    return getattr(torch, name)


def abar(config: dict) -> np.ndarray:
  """Returns alpha^2 at each timestep, float64 [T]."""
  steps = config["num_train_timesteps"]
  if config["beta_schedule"] == "squaredcos_cap_v2":
    at = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    levels = np.cumprod(1 - np.minimum(1 - at[1:] / at[:-1], 0.999))
  else:
    start, end = RANGE.values()
    levels = np.cumprod(1 - np.linspace(start**0.5, end**0.5, steps) ** 2)
  if config.get("rescale_betas_zero_snr"):
    alpha = levels**0.5
    levels = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
  return levels


def prediction(mixture: dict, kind: str, x: torch.Tensor, alpha, sigma) -> torch.Tensor:
  """Returns E[eps, v or x0 | x] for x = alpha x0 + sigma eps, [S, D]."""
  means, stds, weights = (torch.from_numpy(v) for v in mixture.values())
  var = (alpha * stds) ** 2 + sigma**2
  residual = x[:, None] - alpha * means
  log = torch.log(weights) - 0.5 * (residual**2).sum(-1) / var
  share = torch.softmax(log - 0.5 * x.shape[1] * torch.log(var), dim=1)
  eps = sigma * (share[..., None] * residual / var[:, None]).sum(1)
  pull = (alpha * stds**2 / var)[:, None]
  x0 = (share[..., None] * (means + pull * residual)).sum(1)
  return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[kind]


def run_euler(mixture: dict, z: np.ndarray, config: dict, steps: int) -> tuple:
  """Returns the timesteps, and the last states of first states init_noise_sigma z."""
  scheduler = diffusers.EulerDiscreteScheduler(**config)
  scheduler.set_timesteps(steps)
  levels = np.maximum(abar(config), SMALLEST * (abar(config) == 0))
  timesteps = scheduler.timesteps.numpy().astype(np.float64)
  ratios = np.interp(timesteps, np.arange(len(levels)), (1 / levels - 1) ** 0.5)
  ratios = np.append(ratios, 0.0)
  np.testing.assert_allclose(scheduler.sigmas.numpy(), ratios, rtol=1e-3)
  scheduler.sigmas = torch.from_numpy(ratios)
  x = torch.from_numpy(z) * float(scheduler.init_noise_sigma)
  for t, ratio in zip(scheduler.timesteps, ratios, strict=False):
    alpha = (1 + ratio**2) ** -0.5
    scaled = scheduler.scale_model_input(x, t)
    y = prediction(mixture, config["prediction_type"], scaled, alpha, ratio * alpha)
    x = scheduler.step(y, t, x).prev_sample
  return timesteps, x.numpy()


def run_zero_snr(mixture: dict, z: np.ndarray, name: str, config: dict, steps: int):
  """Returns the timesteps and the last states of a scheduler that starts at alpha = 0."""
  scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
  scheduler.set_timesteps(steps)
  levels = abar(config)
  multistep = hasattr(scheduler, "sigmas")
  if multistep:
    levels[-1] = SMALLEST
  np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), levels, atol=1e-4)
  scheduler.alphas_cumprod = torch.from_numpy(levels)
  if name == "DDIM":
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
  if multistep:
    at = scheduler.timesteps.numpy()
    scheduler.sigmas = torch.from_numpy(np.append((1 / levels[at] - 1) ** 0.5, 0.0))
  x = torch.from_numpy(z)
  for t in scheduler.timesteps:
    alpha, sigma = levels[t] ** 0.5, (1 - levels[t]) ** 0.5
    y = prediction(mixture, config["prediction_type"], x, alpha, sigma)
    x = scheduler.step(y, t, x).prev_sample
  return scheduler.timesteps.numpy(), x.numpy()


def main() -> None:
  torch.set_default_dtype(torch.float64)
  scheduling_euler_discrete.torch = Float64()
  rng = np.random.default_rng(0)
  mixture = {
    "means": rng.uniform(-1, 1, (3, 4)),
    "stds": np.array([0.1, 0.3, 0.5]),
    "weights": np.array([0.5, 0.3, 0.2]),
  }
  z = rng.standard_normal((3, 4))
  arrays, runs = {**mixture, "z": z}, {}

  def keep(name: str, cls: str, config: dict, steps: int, result: tuple) -> None:
    timesteps, final = result
    assert np.isfinite(final).all(), name
    if steps <= 50:
      arrays[f"{name}/timesteps"] = timesteps
    arrays[f"{name}/final"] = final
    runs[name] = {"class": cls, "config": config, "steps": steps}

  for (schedule, T), spacing, kind in itertools.product(
    PROCESSES, SPACINGS, PREDICTIONS
  ):
    config = RANGE | {"beta_schedule": schedule, "num_train_timesteps": T}
    config |= {"timestep_spacing": spacing, "prediction_type": kind}
    for steps in (1, 2, 7, 10, 50, T):
      name = f"euler/{schedule}_{spacing}_{kind}_{steps}"
      result = run_euler(mixture, z, config, steps)
      keep(name, "EulerDiscrete", config, steps, result)
    for steps in (10, T) if spacing == "leading" else ():
      offset = config | {"steps_offset": 1}
      name = f"euler/{schedule}_{spacing}_{kind}_{steps}_offset"
      result = run_euler(mixture, z, offset, steps)
      keep(name, "EulerDiscrete", offset, steps, result)
    zero = config | {"rescale_betas_zero_snr": True}
    if kind == "epsilon" or spacing == "leading":
      continue
    for steps in (10, 25):
      for cls, more in (
        ("DDIM", {"clip_sample": False, "set_alpha_to_one": True}),
        ("DPMSolverMultistep", {}),
        ("UniPCMultistep", {}),
      ):
        # Other strides of DDIM than T // N are the same only where N divides T, and the
        # multistep schedulers divide by 0 where timesteps repeat.
        name = f"zero/{cls}_{schedule}_{spacing}_{kind}_{steps}"
        result = run_zero_snr(mixture, z, cls, zero | more, steps)
        keep(name, cls, zero | more, steps, result)
      name = f"zero/Euler_{schedule}_{spacing}_{kind}_{steps}"
      result = run_euler(mixture, z, zero, steps)
      keep(name, "EulerDiscrete", zero, steps, result)
  np.savez_compressed(FILE, **arrays, runs=json.dumps(runs))
  print(f"{FILE}: {len(runs)} runs, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
  main()
