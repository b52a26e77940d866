"""Makes tests/fixtures/weights/dit.pt: a small network in the layout of SiT's files.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy
  /tmp/torch/bin/python third_party/torch_dit.py

The layout is that of the training checkpoints of facebookresearch/DiT and willisma/SiT:
`model`, `ema`, `opt` and `args`. The network is written anew here from arXiv:2212.09748;
dit.npz holds outputs, computed in float64. Weights are random, of float16.
"""

import argparse
import math
import pathlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional

FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "fixtures" / "weights"
WIDTH, SIDE, CHANNELS, CLASSES = 64, 4, 2, 3


def waves(t: torch.Tensor, size: int = 256) -> torch.Tensor:
  angles = t[:, None] * 10_000.0 ** -(torch.arange(size // 2) / (size // 2))
  return torch.cat([angles.cos(), angles.sin()], dim=-1)


def positions() -> torch.Tensor:
  rows, columns = torch.meshgrid(*[torch.arange(SIDE // 2)] * 2, indexing="ij")
  powers = 10_000.0 ** -(torch.arange(WIDTH // 4) / (WIDTH // 4))
  parts = [p.reshape(-1, 1) * powers for p in (columns, rows)]
  return torch.cat([f(a) for a in parts for f in (torch.sin, torch.cos)], dim=-1)[None]


class Dit(nn.Module):
  """The network, whose parts have the names of the public files."""

  def __init__(self):
    super().__init__()
    linear = nn.Linear
    steer = lambda n: nn.Sequential(nn.SiLU(), linear(WIDTH, n * WIDTH))  # noqa: E731
    self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(CHANNELS, WIDTH, 2, 2)})
    self.pos_embed = nn.Parameter(positions(), requires_grad=False)
    mlp = nn.Sequential(linear(256, WIDTH), nn.SiLU(), linear(WIDTH, WIDTH))
    self.t_embedder = nn.ModuleDict({"mlp": mlp})
    table = nn.Embedding(CLASSES + 1, WIDTH)
    self.y_embedder = nn.ModuleDict({"embedding_table": table})
    attn = {"qkv": linear(WIDTH, 3 * WIDTH), "proj": linear(WIDTH, WIDTH)}
    mlp = {"fc1": linear(WIDTH, 4 * WIDTH), "fc2": linear(4 * WIDTH, WIDTH)}
    parts = {"attn": nn.ModuleDict(attn), "mlp": nn.ModuleDict(mlp)}
    parts["adaLN_modulation"] = steer(6)
    self.blocks = nn.ModuleList([nn.ModuleDict(parts)])
    last = {"linear": linear(WIDTH, 8 * CHANNELS), "adaLN_modulation": steer(2)}
    self.final_layer = nn.ModuleDict(last)

  def forward(self, x, t, y):
    norm = lambda h: functional.layer_norm(h, (WIDTH,), eps=1e-6)  # noqa: E731
    h = self.x_embedder["proj"](x).flatten(2).mT + self.pos_embed
    c = self.t_embedder["mlp"](waves(t)) + self.y_embedder["embedding_table"](y)
    for block in self.blocks:
      a, b, gate, a2, b2, gate2 = block["adaLN_modulation"](c)[:, None].chunk(6, -1)
      qkv = block["attn"]["qkv"](norm(h) * (1 + b) + a).chunk(3, -1)
      score = torch.softmax(qkv[0] @ qkv[1].mT / math.sqrt(WIDTH), -1)
      h = h + gate * block["attn"]["proj"](score @ qkv[2])
      hidden = block["mlp"]["fc1"](norm(h) * (1 + b2) + a2)
      hidden = functional.gelu(hidden, approximate="tanh")
      h = h + gate2 * block["mlp"]["fc2"](hidden)
    a, b = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
    h = self.final_layer["linear"](norm(h) * (1 + b) + a)
    h = h.reshape(-1, SIDE // 2, SIDE // 2, 2, 2, 2 * CHANNELS)
    return h.permute(0, 5, 1, 3, 2, 4).reshape(-1, 2 * CHANNELS, SIDE, SIDE)


def main() -> None:
  torch.manual_seed(0)
  net = Dit()
  for p in net.parameters():
    p.data = (p.data + 0.1 * torch.randn_like(p) * p.requires_grad).half()
  ema = {k: v.clone() for k, v in net.state_dict().items()}
  other = {"final_layer.linear.bias": torch.zeros(8 * CHANNELS)}  # one is enough
  args = argparse.Namespace(
    model="SiT-XL/2", image_size=256, num_classes=CLASSES, path_type="Linear",
    prediction="velocity", data_path=None, ckpt_every=50_000,
  )  # fmt: skip
  opt = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1e-4).state_dict()
  content = {"model": other, "ema": ema, "opt": opt, "args": args}
  torch.save(content, FOLDER / "dit.pt")
  net.double()
  net.pos_embed.data = positions().double()
  x, t = (
    torch.randn(2, CHANNELS, SIDE, SIDE).double(),
    torch.tensor([0.3, 0.9]).double(),
  )
  y = torch.tensor([1, CLASSES])
  out = net(x, t, y)[:, :CHANNELS].detach()
  np.savez(FOLDER / "dit.npz", x=x.numpy(), t=t.numpy(), y=y.numpy(), out=out.numpy())


if __name__ == "__main__":
  main()
