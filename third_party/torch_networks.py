"""Time of training steps of EDM2-S and DiT-XL/2 in PyTorch with torch.compile.

  PYTHON-WITH-TORCH third_party/torch_networks.py [--tiny] [--seconds=N] [--only=TEXT]

The networks are those of sdiff_jax/models/edm2.py and dit.py, written here anew for
PyTorch; `torch_networks_check.py` shows that their outputs, losses and gradients are
equal. A step is what our step does: the TrigFlow diffusion loss, its gradient, fused
Adam (AdamW with a bound of the gradient's norm for DiT), one average of the parameters,
and EDM2's normalization of the weights. Parameters are float32 and activations
bfloat16, in the layout channels_last for EDM2.

EDM2 is compiled as a whole, DiT block by block, which PyTorch recommends for equal
blocks, since it compiles 28 times less. The last line of stdout is a list of rows.
--only times the cases whose name contains a text.

  PYTHON-WITH-TORCH third_party/torch_networks.py --check=FILE.npz

computes outputs, losses and gradients for torch_networks_check.py.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch_timing
from torch import Tensor, nn
from torch.nn import functional

MP_EPS, TINY, EPS, BALANCE = 1e-4, 1e-14, 1e-6, 0.3
SIGMA_D, LABEL_DROPOUT = 0.5, 0.1


def normalize(x: Tensor, axes: tuple[int, ...]) -> Tensor:
  """Returns x / (rms(x) + eps) over axes, with statistics in float32."""
  w = x.float()
  rms = (w.square().mean(axes, keepdim=True) + TINY).sqrt()
  return (w / (rms + MP_EPS)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
  return functional.silu(x) / 0.596


def mp_add(a: Tensor, b: Tensor, t: float) -> Tensor:
  return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_concatenate(a: Tensor, b: Tensor, t: float) -> Tensor:
  sizes = a.shape[1], b.shape[1]
  scale = math.sqrt(sum(sizes)) / math.hypot(1 - t, t)
  parts = a * (scale * (1 - t) / sizes[0] ** 0.5), b * (scale * t / sizes[1] ** 0.5)
  return torch.cat(parts, 1)


def one_hot(labels: Tensor, classes: int) -> Tensor:
  """Returns rows of zeros for the label -1, and else of one sqrt(classes)."""
  rows = functional.one_hot(labels + 1, classes + 1)[:, 1:]
  return rows.float() * classes**0.5


class Positional(nn.Module):
  """cos and sin of t at slow frequencies, [B] -> [B, width]."""

  def __init__(self, width: int):
    super().__init__()
    frequencies = 10_000.0 ** -np.linspace(0, 1, width // 2)
    self.register_buffer("frequencies", torch.tensor(frequencies.astype(np.float32)))

  def forward(self, t: Tensor) -> Tensor:
    angles = t[:, None] * self.frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class LogVar(nn.Module):
  """w(t): fixed random features and a linear layer, [B] -> [B]."""

  def __init__(self, features: int = 128):
    super().__init__()
    rng = np.random.default_rng(0)
    frequencies = 2 * np.pi * rng.standard_normal(features, np.float32)
    phases = 2 * np.pi * rng.random(features, np.float32)
    self.register_buffer("frequencies", torch.tensor(frequencies.astype(np.float32)))
    self.register_buffer("phases", torch.tensor(phases.astype(np.float32)))
    self.linear = nn.Linear(features, 1)
    nn.init.zeros_(self.linear.weight)
    nn.init.zeros_(self.linear.bias)

  def forward(self, t: Tensor) -> Tensor:
    x = torch.cos(t[:, None] * self.frequencies + self.phases)
    return self.linear(x * (2 / x.shape[-1]) ** 0.5)[:, 0]


# --- EDM2 ----------------------------------------------------------------------------


class MPWeight(nn.Module):
  """A magnitude-preserving linear layer (size 1) or 3 x 3 convolution of [B, C, H, W].

  A linear layer works on the last axis.
  """

  def __init__(
    self, features_in: int, features: int, dtype: torch.dtype, size: int = 1
  ):
    super().__init__()
    shape = (features, features_in) if size == 1 else (features, features_in, 3, 3)
    self.weight = nn.Parameter(normalize(torch.randn(shape), (*range(1, len(shape)),)))
    self.dtype = dtype

  def forward(self, x: Tensor) -> Tensor:
    stored = self.weight
    axes = tuple(range(1, stored.ndim))
    w = (normalize(stored, axes) / math.prod(stored.shape[1:]) ** 0.5).to(self.dtype)
    if w.ndim == 2:
      return functional.linear(x.to(self.dtype), w)
    return functional.conv2d(x.to(self.dtype), w, padding=1)


class Block(nn.Module):
  """A residual block of EDM2 with the adaptive double norm, see edm2_blocks.py."""

  def __init__(
    self,
    channels: int,
    features: int,
    emb: int,
    dtype: torch.dtype,
    *,
    encoder: bool,
    resample: str,
    heads: int,
  ):
    super().__init__()
    self.encoder, self.resample, self.heads = encoder, resample, heads
    self.skip = MPWeight(channels, features, dtype) if channels != features else None
    first = features if encoder else channels
    self.conv_in = MPWeight(first, features, dtype, 3)
    self.conv_out = MPWeight(features, features, dtype, 3)
    self.scale = MPWeight(emb, features, torch.float32)
    self.shift = MPWeight(emb, features, torch.float32)
    self.qkv = MPWeight(features, 3 * features, dtype) if heads else None
    self.proj = MPWeight(features, features, dtype) if heads else None

  def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
    if skip is not None:
      x = mp_concatenate(x, skip, 0.5)
    if self.resample == "halve":
      x = functional.avg_pool2d(x, 2)
    elif self.resample == "double":
      x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
    main = x
    if self.skip is not None:
      main = self.skip(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if self.encoder:
      main = x = normalize(main, (1,))
    y = self.conv_in(mp_silu(x))
    s, b = (
      normalize(layer(emb), (1,)).to(y.dtype)[:, :, None, None]
      for layer in (self.scale, self.shift)
    )
    y = mp_silu(normalize(y, (1,)) * s + b)
    x = mp_add(main, self.conv_out(y), BALANCE)
    if self.qkv is not None:
      x = mp_add(x, self.attention(x), BALANCE)
    return x.clamp(-256, 256)

  def attention(self, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    y = self.qkv(x.permute(0, 2, 3, 1)).reshape(B, H * W, self.heads, -1, 3)
    y = normalize(y, (3,))
    q, k, v = (a.transpose(1, 2) for a in y.unbind(-1))
    y = functional.scaled_dot_product_attention(q, k, v)
    return self.proj(y.transpose(1, 2).reshape(B, H, W, C)).permute(0, 3, 1, 2)


class UNet(nn.Module):
  """F(x, t, label) of EDM2's U-Net as sCM trains it, x [B, C, H, W]."""

  def __init__(
    self,
    shape: tuple[int, int, int],
    classes: int,
    channels: int,
    channel_mult: tuple[int, ...] = (1, 2, 3, 4),
    blocks: int = 3,
    attn_resolutions: tuple[int, ...] = (16, 8),
    head_channels: int = 64,
    dtype: torch.dtype = torch.float32,
  ):
    super().__init__()
    height, _, out_channels = shape
    sizes = [channels * m for m in channel_mult]
    emb, self.classes, self.dtype = max(sizes), classes, dtype
    self.positional = Positional(sizes[0])
    self.noise = MPWeight(sizes[0], emb, torch.float32)
    self.label = MPWeight(classes, emb, torch.float32)
    self.conv_in = MPWeight(out_channels + 1, sizes[0], dtype, 3)
    self.names: list[tuple[str, bool]] = []  # of blocks, and whether they take a skip
    self.blocks = nn.ModuleDict()

    def add(part: str, level: int, name: str, width: int, size: int, skip: int) -> None:
      attends = name == "in0" or (
        "block" in name and height >> level in attn_resolutions
      )
      full = f"{part}_{level}_{name}"
      self.names.append((full, skip > 0))
      self.blocks[full] = Block(
        width + skip,
        size,
        emb,
        dtype,
        encoder=part == "enc",
        resample={"down": "halve", "up": "double"}.get(name, ""),
        heads=size // head_channels if attends else 0,
      )

    width, skips = sizes[0], [sizes[0]]
    for level, size in enumerate(sizes):
      for i in range(-1 if level else 0, blocks):
        size_here = width if i < 0 else size
        add("enc", level, "down" if i < 0 else f"block{i}", width, size_here, 0)
        width = size_here
        skips.append(width)
    self.encoders = len(self.names)
    for level, size in reversed([*enumerate(sizes)]):
      for name in ("up",) if level < len(sizes) - 1 else ("in0", "in1"):
        add("dec", level, name, width, width, 0)
      for i in range(blocks + 1):
        add("dec", level, f"block{i}", width, size, skips.pop())
        width = size
    self.conv_out = MPWeight(width, out_channels, dtype, 3)
    self.gain = nn.Parameter(torch.zeros(()))
    self.logvar = LogVar()

  def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    emb = self.noise(self.positional(t) * 2**0.5)
    emb = mp_silu(mp_add(emb, self.label(one_hot(label, self.classes)), 0.5))
    h = torch.cat([x, torch.ones_like(x[:, :1])], 1).to(self.dtype)
    h = self.conv_in(h)
    skips = [h]
    for i, (name, takes_skip) in enumerate(self.names):
      h = self.blocks[name](h, emb, skips.pop() if takes_skip else None)
      if i < self.encoders:
        skips.append(h)
    return self.conv_out(h).float() * self.gain


# --- DiT -----------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
  w = x.float()
  return (w * torch.rsqrt(w.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def cast_linear(layer: nn.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
  """Returns the linear layer of x, computed in a dtype."""
  bias = None if layer.bias is None else layer.bias.to(dtype)
  return functional.linear(x.to(dtype), layer.weight.to(dtype), bias)


class DoubleNorm(nn.Module):
  """norm(x) pnorm(s(emb)) + pnorm(b(emb)), [B, L, C]."""

  def __init__(self, width: int, dtype: torch.dtype):
    super().__init__()
    self.scale, self.shift = nn.Linear(width, width), nn.Linear(width, width)
    self.dtype = dtype

  def forward(self, x: Tensor, emb: Tensor) -> Tensor:
    s, b = (
      rms_norm(cast_linear(layer, emb, self.dtype))[:, None]
      for layer in (self.scale, self.shift)
    )
    w = x.float()
    return rms_norm(w - w.mean(-1, keepdim=True)).to(x.dtype) * s + b


class DitBlock(nn.Module):
  """Residual attention and MLP, each behind an adaptive double norm, [B, L, C]."""

  def __init__(self, width: int, heads: int, dtype: torch.dtype):
    super().__init__()
    self.heads, self.dtype = heads, dtype
    self.attention_norm = DoubleNorm(width, dtype)
    self.mlp_norm = DoubleNorm(width, dtype)
    self.qkv = nn.Linear(width, 3 * width)
    self.attention_out = nn.Linear(width, width)
    self.mlp_in = nn.Linear(width, 4 * width)
    self.mlp_out = nn.Linear(4 * width, width)

  def forward(self, h: Tensor, emb: Tensor) -> Tensor:
    linear = functools.partial(cast_linear, dtype=self.dtype)
    B, L, C = h.shape
    y = linear(self.qkv, self.attention_norm(h, emb)).reshape(B, L, 3, self.heads, -1)
    q, k, v = (a.transpose(1, 2) for a in y.unbind(2))
    y = functional.scaled_dot_product_attention(rms_norm(q), rms_norm(k), v)
    h = h + linear(self.attention_out, y.transpose(1, 2).reshape(B, L, C))
    y = linear(self.mlp_in, self.mlp_norm(h, emb))
    return h + linear(self.mlp_out, functional.gelu(y, approximate="tanh"))


class Dit(nn.Module):
  """F(x, t, label) of the diffusion transformer, x [B, C, H, W]."""

  def __init__(
    self,
    shape: tuple[int, int, int],
    classes: int,
    patch: int,
    width: int,
    depth: int,
    heads: int,
    dtype: torch.dtype = torch.float32,
  ):
    super().__init__()
    height, columns, channels = shape
    self.patch, self.classes, self.dtype = patch, classes, dtype
    self.positional = Positional(width)
    self.time = nn.Linear(width, width)
    self.label = nn.Linear(classes, width, bias=False)
    self.emb = nn.Linear(width, width)
    self.first = nn.Linear(patch * patch * channels, width)
    self.blocks = nn.ModuleList(DitBlock(width, heads, dtype) for _ in range(depth))
    self.norm = DoubleNorm(width, dtype)
    self.last = nn.Linear(width, patch * patch * channels)
    frequencies = 10_000.0 ** -np.linspace(0, 1, width // 4, endpoint=False)
    parts = []
    for index in np.mgrid[: height // patch, : columns // patch].reshape(2, -1, 1):
      parts += [np.sin(index * frequencies), np.cos(index * frequencies)]
    grid = np.concatenate(parts, axis=-1).astype(np.float32)
    self.register_buffer("positions", torch.tensor(grid))
    self.logvar = LogVar()

  def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    B, C, H, W = x.shape
    p, rows, columns = self.patch, H // self.patch, W // self.patch
    emb = self.time(self.positional(t)) + self.label(one_hot(label, self.classes))
    emb = functional.silu(self.emb(functional.silu(emb))).to(self.dtype)
    h = x.reshape(B, C, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
    h = cast_linear(self.first, h.reshape(B, rows * columns, -1), self.dtype)
    h = h + self.positions.to(self.dtype)
    for block in self.blocks:
      h = block(h, emb)
    h = cast_linear(self.last, self.norm(h, emb), self.dtype)
    h = h.reshape(B, rows, columns, p, p, C).permute(0, 5, 1, 3, 2, 4)
    return h.reshape(B, C, H, W).float()


# --- the training step ---------------------------------------------------------------


def loss_at(net: nn.Module, x0: Tensor, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
  """Returns the TrigFlow diffusion loss of data x0 with noise z at times t."""
  cos, sin = (a[:, None, None, None] for a in (t.cos(), t.sin()))
  F = net((cos * x0 + sin * z) / SIGMA_D, t, label)
  error = F - (cos * z - sin * x0) / SIGMA_D
  w = net.logvar(t)
  return (w.exp() * error.square().mean((1, 2, 3)) - w).mean()


def loss(net: nn.Module, x0: Tensor, label: Tensor) -> Tensor:
  """Returns the loss with its random draws."""
  tau = -0.4 + torch.randn(x0.shape[0], device=x0.device)
  z = SIGMA_D * torch.randn_like(x0)
  drop = torch.rand(label.shape, device=label.device) < LABEL_DROPOUT
  label = torch.where(drop, -1, label)
  return loss_at(net, x0, z, torch.arctan(tau.exp() / SIGMA_D), label)


@torch.no_grad()
def normalize_weights(weights: list[Tensor]) -> None:
  """Restores the norm of EDM2's stored weights ("forced" weight normalization)."""
  for w in weights:
    w.copy_(normalize(w, tuple(range(1, w.ndim))))


def step(net: nn.Module, batch: int, shape: tuple[int, int, int]) -> Callable[[], None]:
  """Returns a training step, to be called repeatedly."""
  device = torch_timing.DEVICE
  net.to(device)
  edm2 = isinstance(net, UNet)
  height, width, channels = shape
  x0 = SIGMA_D * torch.randn(batch, channels, height, width, device=device)
  if edm2:
    net.to(memory_format=torch.channels_last)
    x0 = x0.to(memory_format=torch.channels_last)
  label = torch.randint(0, net.classes, (batch,), device=device)
  params = [*net.parameters()]
  average = [p.detach().clone() for p in params]
  weights = [m.weight for m in net.modules() if isinstance(m, MPWeight)]
  if edm2:
    optimizer = torch.optim.Adam(params, 1e-4, (0.9, 0.99), 1e-11, fused=True)
    gradient_of = torch.compile(loss, **torch_timing.COMPILE)
    renormalize = torch.compile(normalize_weights, **torch_timing.COMPILE)
  else:
    optimizer = torch.optim.AdamW(params, 1e-4, (0.9, 0.999), 1e-8, 0.0, fused=True)
    for block in net.blocks:
      block.compile(**torch_timing.COMPILE)
    gradient_of = loss

  def call() -> None:
    optimizer.zero_grad(set_to_none=True)
    gradient_of(net, x0, label).backward()
    if not edm2:
      nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
    optimizer.step()
    if edm2:
      renormalize(weights)
    with torch.no_grad():
      torch._foreach_lerp_(average, params, 1e-3)

  return call


def networks(tiny: bool) -> Iterator[tuple[str, tuple[int, ...], int, Callable]]:
  """Yields name, shape of a sample, batch size, and what builds the network."""
  dtype = torch.bfloat16
  if tiny:
    edm2 = {"channels": 8, "channel_mult": (1, 2), "blocks": 1, "head_channels": 8}
    edm2 |= {"attn_resolutions": (4,)}
    dit = {"patch": 2, "width": 32, "depth": 2, "heads": 2}
    classes, order = 10, (("EDM2-S", 8, 16), ("DiT-XL/2", 8, 16))
  else:
    edm2 = {"channels": 192}
    dit = {"patch": 2, "width": 1152, "depth": 28, "heads": 16}
    classes = 1000
    # In the order of worth, since time may end before the last one.
    order = ("EDM2-S", 64, 128), ("DiT-XL/2", 32, 32)
    order += ("DiT-XL/2", 64, 32), ("EDM2-S", 64, 32)
  for name, side, batch in order:
    shape, options = (side, side, 4), edm2 if name == "EDM2-S" else dit
    full = f"{name} diffusion batch {batch}"
    if name == "DiT-XL/2":
      full = f"{name} diffusion {(side // 2) ** 2} tokens"
    build = functools.partial(
      UNet if name == "EDM2-S" else Dit, shape, classes, dtype=dtype, **options
    )
    yield full, shape, batch, build


def cases(options: argparse.Namespace) -> Iterator[torch_timing.Case]:
  """Yields the steps to time."""
  for name, shape, batch, network in networks(options.tiny):
    if options.only in name:

      def build(network=network, batch=batch, shape=shape) -> Callable[[], None]:
        torch.manual_seed(0)
        return step(network(), batch, shape)

      yield torch_timing.Case(name, batch, build)


# --- the check -----------------------------------------------------------------------


def load(net: nn.Module, arrays: dict[str, np.ndarray]) -> None:
  """Copies our parameters, which the arrays name as Flax does, into a network."""
  pairs: dict[str, tuple[nn.Parameter, np.ndarray]] = {}

  def linear(layer: nn.Linear, kernel: np.ndarray, bias: np.ndarray | None) -> None:
    pairs[f"{len(pairs)}"] = layer.weight, kernel.reshape(layer.in_features, -1).T
    if bias is not None:
      pairs[f"{len(pairs)}"] = layer.bias, bias.reshape(-1)

  def dense(layer: nn.Linear, path: str, i: int | None = None) -> None:
    kernel, bias = arrays[f"{path}/kernel"], arrays.get(f"{path}/bias")
    if i is not None:
      kernel, bias = kernel[i], None if bias is None else bias[i]
    linear(layer, kernel, bias)

  def weight(layer: MPWeight, path: str) -> None:
    array = arrays[f"{path}/weight"]
    axes = (1, 0) if array.ndim == 2 else (3, 2, 0, 1)
    pairs[path] = layer.weight, array.transpose(axes)

  dense(net.logvar.linear, "logvar/Dense_0")
  if isinstance(net, UNet):
    pairs["gain"] = net.gain, arrays["net/gain"]
    for name, layer in (("noise", net.noise), ("label", net.label)):
      weight(layer, f"net/embedding/{name}")
    weight(net.conv_in, "net/in")
    weight(net.conv_out, "net/out")
    parts = {"in": "conv_in", "out": "conv_out", "skip": "skip"}
    parts |= {f"modulation/{name}": name for name in ("scale", "shift")}
    parts |= {f"attention/{name}": name for name in ("qkv", "proj")}
    for name, block in net.blocks.items():
      for path, attribute in parts.items():
        if getattr(block, attribute) is not None:
          weight(getattr(block, attribute), f"net/{name}/{path}")
  else:
    names = {"time": net.time, "label": net.label, "out": net.emb}
    for name, layer in names.items():
      dense(layer, f"net/Embedding_0/{name}")
    dense(net.first, "net/in")
    dense(net.last, "net/out")
    norms = [("net/out_norm", net.norm, None)]
    for i, block in enumerate(net.blocks):
      norms.append(("net/blocks/attention_norm", block.attention_norm, i))
      norms.append(("net/blocks/mlp_norm", block.mlp_norm, i))
      dense(block.attention_out, "net/blocks/attention/out", i)
      dense(block.mlp_in, "net/blocks/mlp/in", i)
      dense(block.mlp_out, "net/blocks/mlp/out", i)
      qkv = [f"net/blocks/attention/{name}" for name in ("query", "key", "value")]
      width = block.qkv.in_features
      kernels = [arrays[f"{path}/kernel"][i].reshape(width, width) for path in qkv]
      biases = [arrays[f"{path}/bias"][i].reshape(width) for path in qkv]
      linear(block.qkv, np.concatenate(kernels, 1), np.concatenate(biases))
    for path, norm, i in norms:
      dense(norm.scale, f"{path}/scale", i)
      dense(norm.shift, f"{path}/shift", i)
  for parameter, array in pairs.values():
    assert parameter.shape == array.shape, (parameter.shape, array.shape)
    parameter.data = torch.tensor(np.ascontiguousarray(array))
  copied = sum(parameter.numel() for parameter, _ in pairs.values())
  size = sum(
    a.size for name, a in arrays.items() if name.startswith(("net/", "logvar"))
  )
  assert copied == size == count(net), (copied, size, count(net))


def count(net: nn.Module) -> int:
  """Returns the number of parameters."""
  return sum(p.numel() for p in net.parameters())


def check(path: str) -> dict[str, float]:
  """Returns our outputs' and losses' distances to those computed here, from a file.

  It has arrays "NAME:PATH" of the networks "edm2" and "dit", and "options".
  """
  stored = np.load(path)
  options = json.loads(str(stored["options"]))
  results: dict[str, float] = {}
  for name, cls in (("edm2", UNet), ("dit", Dit)):
    arrays = {
      key.partition(":")[2]: stored[key] for key in stored if key.startswith(f"{name}:")
    }
    net = cls(**options[name])
    load(net, arrays)
    x, z, F = (torch.tensor(arrays[key]).permute(0, 3, 1, 2) for key in ("x", "z", "F"))
    t, label = torch.tensor(arrays["t"]), torch.tensor(arrays["label"]).long()
    output = net(x, t, label).detach()
    results[f"{name} output"] = float((output - F).abs().max() / F.abs().max())
    value = loss_at(net, x, z, t, label)
    value.backward()
    results[f"{name} loss"] = abs(float(value.detach()) / float(arrays["loss"]) - 1)
    norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
    results[f"{name} gradient norm"] = abs(float(norm) / float(arrays["norm"]) - 1)
  with torch.device("meta"):
    edm2 = UNet((64, 64, 4), 1000, 192)
    dit = Dit((32, 32, 4), 1000, 2, 1152, 28, 16)
  return results | {"EDM2-S parameters": count(edm2), "DiT-XL/2 parameters": count(dit)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU")
  parser.add_argument("--seconds", type=float, default=1e6, help="of the whole run")
  parser.add_argument("--only", default="", help="part of the names to time")
  parser.add_argument("--check", default="", help="a file of torch_networks_check.py")
  options = parser.parse_args()
  if options.check:
    print(json.dumps(check(options.check)))
    return
  torch.set_float32_matmul_precision("high")
  torch_timing.run(cases(options), options.seconds)


if __name__ == "__main__":
  main()
