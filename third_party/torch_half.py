"""PyTorch's half of torch_step.py, which starts it: the network and two steps.

`mlp` is here, EDM2's U-Net in torch_networks.py.

  PYTHON-WITH-TORCH third_party/torch_half.py FOLDER

FOLDER has our arrays and settings; requests and answers are lines of JSON.
"""

import json
import math
import os
import pathlib
import sys
import time

import numpy as np
import torch
import torch_networks
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

FOLDER = pathlib.Path(sys.argv[1])
SET = json.loads((FOLDER / "settings.json").read_text())
SHAPE, CLASSES, MODEL = (SET[k] for k in ("shape", "classes", "model"))
WIDTH, DEPTH, EMBED = (MODEL.get(k) for k in ("width", "depth", "embed"))
SIGMA_D, EPS = SET["sigma_d"], 1e-6


def rms_norm(x):
  return functional.rms_norm(x, x.shape[-1:], eps=EPS)


class DoubleNorm(nn.Module):
  def __init__(self):
    super().__init__()
    self.scale = nn.Linear(EMBED, WIDTH)
    self.shift = nn.Linear(EMBED, WIDTH)

  def forward(self, x, emb):
    x = functional.layer_norm(x, x.shape[-1:], eps=EPS)
    return x * rms_norm(self.scale(emb)) + rms_norm(self.shift(emb))


class Block(nn.Module):
  def __init__(self):
    super().__init__()
    self.norm = DoubleNorm()
    self.first = nn.Linear(WIDTH, WIDTH)
    self.second = nn.Linear(WIDTH, WIDTH)

  def forward(self, h, emb):
    y = self.first(functional.silu(self.norm(h, emb)))
    return h + self.second(functional.silu(y))


class Mlp(nn.Module):
  """F(x, t, label) of sdiff_jax/models/mlp.py, and its w_phi(t)."""

  def __init__(self):
    super().__init__()
    size = math.prod(SHAPE)
    self.time = nn.Linear(EMBED, EMBED)
    self.label = nn.Linear(CLASSES, EMBED, bias=False)
    self.emb = nn.Linear(EMBED, EMBED)
    self.first = nn.Linear(size, WIDTH)
    self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
    self.norm = DoubleNorm()
    self.gain, self.shift = nn.Linear(WIDTH, size), nn.Linear(WIDTH, size)
    self.w = nn.Linear(128, 1)
    rng = np.random.default_rng(0)
    fixed = {"fourier": 2 * np.pi * rng.standard_normal(128, np.float32)}
    fixed["phases"] = 2 * np.pi * rng.random(128, np.float32)
    fixed["positional"] = 10_000.0 ** -np.linspace(0, 1, EMBED // 2)
    for name, array in fixed.items():
      self.register_buffer(name, torch.tensor(array, dtype=torch.float32))

  def forward(self, x, t, label):
    angles = t[:, None] * self.positional
    emb = self.time(torch.cat([angles.cos(), angles.sin()], -1))
    # One column more, so that the label -1 is a row of zeros.
    labels = functional.one_hot(label + 1, CLASSES + 1)[:, 1:]
    emb = emb + self.label(labels.to(emb.dtype) * CLASSES**0.5)
    emb = functional.silu(self.emb(functional.silu(emb)))
    flat = x.flatten(1)
    h = self.first(flat)
    for block in self.blocks:
      h = block(h, emb)
    h = functional.silu(self.norm(h, emb))
    return (self.gain(h) * flat + self.shift(h)).reshape(x.shape)

  def logvar(self, t):
    x = torch.cos(t[:, None] * self.fourier + self.phases) * (2 / 128) ** 0.5
    return self.w(x)[:, 0]


class UNet(nn.Module):
  """EDM2's U-Net on [B, H, W, C], and its w_phi(t)."""

  def __init__(self):
    super().__init__()
    names = ("channels", "channel_mult", "blocks", "attn_resolutions", "head_channels")
    self.net = torch_networks.UNet(SHAPE, CLASSES, *(MODEL[k] for k in names))
    self.net.to(memory_format=torch.channels_last)

  def forward(self, x, t, label):
    # In memory, [B, H, W, C] is [B, C, H, W] with the channels last: nothing moves.
    return self.net(x.permute(0, 3, 1, 2), t, label).permute(0, 2, 3, 1)

  def logvar(self, t):
    return self.net.logvar(t)


def load(arrays, prefix):
  """Returns the network with our parameters, which the arrays name as Flax does."""
  if MODEL["name"] == "mlp":
    return load_mlp(arrays, prefix)
  net, start = UNet(), f"{prefix}/"
  own = {k[len(start) :]: v for k, v in arrays.items() if k.startswith(start)}
  torch_networks.load(net.net, own)
  return net


def load_mlp(arrays, prefix):
  """Returns the network of sdiff_jax/models/mlp.py with our parameters."""
  net = Mlp()
  pairs = {"net/Embedding_0/time": net.time, "net/Embedding_0/label": net.label}
  pairs |= {"net/Embedding_0/out": net.emb, "net/in": net.first}
  pairs |= {"net/gain": net.gain, "net/shift": net.shift, "logvar/Dense_0": net.w}
  for name in ("scale", "shift"):
    pairs[f"net/out_norm/{name}"] = getattr(net.norm, name)
  for i, block in enumerate(net.blocks):
    pairs[f"net/blocks/Dense_0@{i}"] = block.first
    pairs[f"net/blocks/Dense_1@{i}"] = block.second
    for name in ("scale", "shift"):
      where = f"net/blocks/AdaptiveDoubleNorm_0/{name}@{i}"
      pairs[where] = getattr(block.norm, name)
  for path, linear in pairs.items():
    path, _, i = path.partition("@")
    kernel = arrays[f"{prefix}/{path}/kernel"]
    linear.weight.data = torch.tensor((kernel[int(i)] if i else kernel).T.copy())
    if linear.bias is not None:
      bias = arrays[f"{prefix}/{path}/bias"]
      linear.bias.data = torch.tensor(bias[int(i)] if i else bias)
  count = sum(a.size for path, a in arrays.items() if path.startswith(prefix + "/"))
  assert count == sum(p.numel() for p in net.parameters()), "mlp.py has changed"
  return net


def weighted(net, error, t):
  w = net.logvar(t)
  return (w.exp() * error.square().mean((1, 2, 3)) - w).mean()


def teacher_loss(net, frozen, x0, label, t, z, r):
  c, s = (a[:, None, None, None] for a in (t.cos(), t.sin()))
  F = net((c * x0 + s * z) / SIGMA_D, t, label)
  return weighted(net, F - (c * z - s * x0) / SIGMA_D, t)


def derivative(net, x, t, label, dx, dt):
  """Returns the derivative of F along (dx, dt)."""
  params = dict(net.named_parameters())

  def of(x, t):
    return torch.func.functional_call(net, params, (x, t, label))

  # The fused attention of PyTorch has no forward derivative.
  with sdpa_kernel(SDPBackend.MATH):
    return torch.func.jvp(of, (x, t), (dx, dt))


def scd_loss(net, frozen, x0, label, t, z, r):
  c, s = (a[:, None, None, None] for a in (t.cos(), t.sin()))
  xt = c * x0 + s * z
  with torch.no_grad():
    v = SIGMA_D * frozen(xt / SIGMA_D, t, label)
    dx, dt = c * s * v / SIGMA_D, t.cos() * t.sin()
    old, J = derivative(net, xt / SIGMA_D, t, label, dx, dt)
    g = -(c**2) * (SIGMA_D * old - v) - r * (c * s * xt + SIGMA_D * J)
    g = g / (g.square().mean((1, 2, 3), keepdim=True).sqrt() + SET["sCD"]["c"])
  F = net(xt / SIGMA_D, t, label)
  return weighted(net, F - old - g, t)


def training(name, loss, arrays):
  """Returns (count) -> seconds of so many steps."""
  drawn, warmup = SET[name], SET["sCD"]["warmup_steps"]
  net, frozen = load(arrays, "student"), load(arrays, "frozen").requires_grad_(False)
  params = list(net.parameters())
  optimizer = torch.optim.Adam(params, fused=True, **SET["adam"])
  averages = [p.detach().clone() for p in params]
  weights = [m.weight for m in net.modules() if isinstance(m, torch_networks.MPWeight)]
  x0, labels = torch.tensor(arrays["x0"]), torch.tensor(arrays["label"]).long()
  done = 0

  def step():
    nonlocal done
    tau = drawn["p_mean"] + drawn["p_std"] * torch.randn(len(x0))
    t, z, label = (tau.exp() / SIGMA_D).arctan(), SIGMA_D * torch.randn_like(x0), labels
    if name == "teacher":
      label = torch.where(torch.rand(len(x0)) < drawn["label_dropout"], -1, labels)
    # A tensor: torch.compile would compile anew for every number.
    r = torch.tensor(min(1.0, done / warmup))
    value = loss(net, frozen, x0, label, t, z, r)
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    optimizer.step()
    torch_networks.normalize_weights(weights)
    done += 1
    with torch.no_grad():
      torch._foreach_lerp_(averages, params, 1 - (1 - 1 / done) ** SET["exponent"])

  def run(count):
    begin = time.perf_counter()
    for _ in range(count):
      step()
    return time.perf_counter() - begin

  return run


def check(arrays):
  """Writes F and dF/dt of our inputs, returns losses and norms of gradients."""
  net, frozen = load(arrays, "student"), load(arrays, "frozen").requires_grad_(False)
  x, t, dx, dt = (torch.tensor(arrays[k]) for k in ("x", "t", "dx", "dt"))
  with torch.no_grad():
    F, J = derivative(net, x, t, torch.tensor(arrays["label"]).long(), dx, dt)
  np.savez(FOLDER / "theirs.npz", F=F, J=J)
  out = {}
  r = torch.tensor(SET["step"] / SET["sCD"]["warmup_steps"])
  for name, loss in (("teacher", teacher_loss), ("sCD", scd_loss)):
    keys = ("x0", f"{name}/label", f"{name}/t", f"{name}/z")
    x0, label, t, z = (torch.tensor(arrays[k]) for k in keys)
    value = loss(net, frozen, x0, label.long(), t, z, r)
    grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    norm = sum(g.square().sum() for g in grads if g is not None) ** 0.5
    out[name] = [value.item(), norm.item()]
  return out


def main():
  """Answers lines of JSON on stdin until they end."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  arrays = dict(np.load(FOLDER / "ours.npz"))
  runs = {}
  for line in sys.stdin:
    what, *rest = json.loads(line)
    try:
      if what == "check":
        answer = {"version": torch.__version__, **check(arrays)}
      elif what == "start":
        name, compiled = rest
        loss = {"teacher": teacher_loss, "sCD": scd_loss}[name]
        loss = torch.compile(loss) if compiled else loss
        runs[name, compiled] = training(name, loss, arrays)
        answer = runs[name, compiled](3)
      else:
        answer = runs[rest[0], rest[1]](rest[2])
    except Exception as error:  # of torch.compile, which may not know an operation
      answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
