"""The PyTorch half of `torch_policy.py`: the same MLP, diffusers' DDPM.

Reads an .npz of parameters and inputs, checks its network against F there, then answers
each line on stdin with the seconds that one chunk of actions took.
"""

import sys
import time

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch.nn.functional import linear, silu

SIGMA_D, STEPS, EPS = 0.5, 100, 1e-6


class Policy:
  """The network `mlp` with observations; parameters as torch tensors by name."""

  def __init__(self, arrays: dict[str, np.ndarray]):
    self.p = {k: torch.tensor(v) for k, v in arrays.items()}
    self.depth = len(self.p["blocks/Dense_0/kernel"])

  def dense(self, name: str, x: torch.Tensor, block: int | None = None) -> torch.Tensor:
    kernel, bias = self.p[f"{name}/kernel"], self.p[f"{name}/bias"]
    if block is not None:
      kernel, bias = kernel[block], bias[block]
    return linear(x, kernel.T, bias)

  def norm(self, name: str, h: torch.Tensor, emb: torch.Tensor, block=None):
    s, b = (_rms(self.dense(f"{name}/{k}", emb, block)) for k in ("scale", "shift"))
    return _rms(h - h.mean(-1, keepdim=True)) * s + b

  def __call__(self, x: torch.Tensor, t: torch.Tensor, seen: torch.Tensor):
    emb = self.p["Embedding_0/time/kernel"].shape[0]
    frequencies = torch.tensor(10_000.0 ** -np.linspace(0, 1, emb // 2)).float()
    angles = t[:, None] * frequencies[None]
    angles = torch.cat([angles.cos(), angles.sin()], -1)
    emb = self.dense("Embedding_0/time", angles)
    emb = silu(emb + self.dense("Embedding_0/observation", seen))
    emb = silu(self.dense("Embedding_0/out", emb))
    flat = x.flatten(1)
    h = self.dense("in", flat)
    for k in range(self.depth):
      y = silu(self.norm("blocks/AdaptiveDoubleNorm_0", h, emb, k))
      y = silu(self.dense("blocks/Dense_0", y, k))
      h = h + self.dense("blocks/Dense_1", y, k)
    h = silu(self.norm("out_norm", h, emb))
    return (self.dense("gain", h) * flat + self.dense("shift", h)).view(x.shape)


def _rms(x: torch.Tensor) -> torch.Tensor:
  return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def chunk(net: Policy, seen: torch.Tensor, scheduler: DDPMScheduler) -> torch.Tensor:
  """Returns a sample of DDPM in 100 steps, [1, H, Da]."""
  x = torch.randn(1, 16, 2)
  abar = scheduler.alphas_cumprod
  for step in scheduler.timesteps:
    alpha, sigma = abar[step].sqrt(), (1 - abar[step]).sqrt()
    t = torch.atan2(sigma, SIGMA_D * alpha).view(1).to(x.device)
    scaled = x / torch.sqrt((alpha * SIGMA_D) ** 2 + sigma**2)
    eps = t.sin() * scaled + t.cos() * net(scaled, t, seen)
    x = scheduler.step(eps, step, x).prev_sample
  return x


def main() -> None:
  torch.manual_seed(0)
  torch.set_num_threads(1)  # more only cost, for one robot
  torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
  with np.load(sys.argv[1]) as arrays:
    found = dict(arrays)
  given = {k: torch.tensor(found.pop(k)) for k in ("x", "t", "seen", "F")}
  net = Policy(found)
  scheduler = DDPMScheduler(
    num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2", clip_sample=False
  )
  scheduler.set_timesteps(STEPS)
  with torch.inference_mode():
    off = (net(given["x"], given["t"], given["seen"]) - given["F"]).abs().max()
    chunk(net, given["seen"][:1], scheduler)
    print(float(off), flush=True)
    for _ in sys.stdin:
      begin = time.perf_counter()
      chunk(net, given["seen"][:1], scheduler).cpu()
      print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
  main()
