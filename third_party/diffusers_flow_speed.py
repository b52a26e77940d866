"""Samples a random SD3 or Flux transformer of 50 million parameters with diffusers.

  PYTHON-WITH-TORCH-AND-DIFFUSERS third_party/diffusers_flow_speed.py FOLDER sd3|flux

Writes the transformer, its scheduler and conditions into FOLDER, and then answers each
line of stdin, a number of steps, with the seconds of a whole sample (batch 1, float32, no
guidance), and those of its processors, as a line of stdout. benchmarks/flow_transformers.py
reads the folder and asks.
"""

import json
import pathlib
import sys
import time

import numpy as np
import torch
from diffusers import (
  FlowMatchEulerDiscreteScheduler,
  FluxTransformer2DModel,
  SD3Transformer2DModel,
)

SIDE, TOKENS = 32, 64  # of the latents; of the text
COMMON = {"attention_head_dim": 64, "num_attention_heads": 6}
COMMON |= {"joint_attention_dim": 384, "pooled_projection_dim": 256}
NETWORKS = {
  "sd3": lambda: SD3Transformer2DModel(
    sample_size=SIDE,
    in_channels=16,
    out_channels=16,
    num_layers=12,
    caption_projection_dim=384,
    pos_embed_max_size=SIDE // 2,
    **COMMON,
  ),
  "flux": lambda: FluxTransformer2DModel(
    in_channels=64,
    num_layers=6,
    num_single_layers=9,
    axes_dims_rope=(16, 24, 24),
    guidance_embeds=True,
    **COMMON,
  ),
}


def pack(x: torch.Tensor) -> torch.Tensor:
  x = x.view(1, 16, SIDE // 2, 2, SIDE // 2, 2).permute(0, 2, 4, 1, 3, 5)
  return x.reshape(1, SIDE * SIDE // 4, 64)


def unpack(x: torch.Tensor) -> torch.Tensor:
  x = x.view(1, SIDE // 2, SIDE // 2, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
  return x.reshape(1, 16, SIDE, SIDE)


def main() -> None:
  folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
  torch.manual_seed(0)
  net = NETWORKS[kind]().eval().requires_grad_(False)
  for p in net.parameters():
    # The initial weights of some layers are zero.
    p.data = p.data + 0.7 * torch.randn_like(p) / max(p.shape[-1], 64) ** 0.5
  net.save_pretrained(folder / "transformer")
  scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
  scheduler.save_pretrained(folder / "scheduler")
  text, pooled = torch.randn(1, TOKENS, 384), torch.randn(1, 256)
  start = torch.randn(1, 16, SIDE, SIDE)
  np.savez(folder / "inputs.npz", text=text, pooled=pooled, start=start)
  ids = torch.zeros(SIDE // 2, SIDE // 2, 3)
  ids[..., 1] += torch.arange(SIDE // 2)[:, None]
  ids[..., 2] += torch.arange(SIDE // 2)[None]
  flux = {"img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(TOKENS, 3)}
  flux["guidance"] = torch.tensor([3.5])
  shared = {"encoder_hidden_states": text, "pooled_projections": pooled}

  @torch.inference_mode()
  def sample(steps: int) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    x = start.clone()
    for t in scheduler.timesteps:
      if kind == "sd3":
        out = net(x, timestep=t[None], **shared).sample
      else:
        out = unpack(net(pack(x), timestep=t[None] / 1000, **shared, **flux).sample)
      x = scheduler.step(out, t, x).prev_sample
    return x

  count = sum(p.numel() for p in net.parameters())
  print(
    json.dumps({"parameters": count, "threads": torch.get_num_threads()}), flush=True
  )
  for line in sys.stdin:
    begin = time.perf_counter(), time.process_time()
    x = sample(int(line))
    end = time.perf_counter(), time.process_time()
    np.save(folder / "end.npy", x.numpy())
    print(json.dumps([e - b for b, e in zip(begin, end, strict=True)]), flush=True)


if __name__ == "__main__":
  main()
