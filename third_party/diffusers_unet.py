"""Time of one call of diffusers' U-Net with torch.compile.

  PYTHON-WITH-TORCH-AND-DIFFUSERS third_party/diffusers_unet.py FOLDER BATCH...
      [--tiny] [--seconds=N] [--mode=MODE]

The network is that of FOLDER/unet/config.json with random weights, in bfloat16 and
channels_last, without gradients, at latents of the config's size and 77 tokens of text.
Only diffusers and PyTorch are needed. The last line of stdout is a list of rows; MODE
is a mode of torch.compile, or "eager".
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch_timing
from diffusers import UNet2DConditionModel

TOKENS = 77


def network(folder: pathlib.Path) -> UNet2DConditionModel:
  """Returns the network with random weights."""
  config = json.loads((folder / "unet" / "config.json").read_text())
  dtype = torch.get_default_dtype()
  torch.set_default_dtype(torch.bfloat16)  # creates the weights in this type
  try:
    with torch.device(torch_timing.DEVICE):
      unet = UNet2DConditionModel.from_config(config)
  finally:
    torch.set_default_dtype(dtype)
  return unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def cases(options: argparse.Namespace) -> Iterator[torch_timing.Case]:
  """Yields one call of the network at each batch size."""
  torch.manual_seed(0)
  unet = network(options.folder)

  def build(batch: int) -> Callable[[], Any]:
    config, device = unet.config, torch_timing.DEVICE
    side, channels = config.sample_size, config.in_channels
    tensors = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(batch, channels, side, side, **tensors)
    x = x.to(memory_format=torch.channels_last)
    text = torch.randn(batch, TOKENS, config.cross_attention_dim, **tensors)
    t = torch.full((batch,), 500, device=device)
    forward = unet.forward
    if options.mode != "eager":
      # The backend for a rehearsal on a CPU has no modes.
      on_gpu = options.mode != "default" and device == "cuda"
      mode = {"mode": options.mode} if on_gpu else {}
      forward = torch.compile(unet.forward, **mode, **torch_timing.COMPILE)

    @torch.inference_mode()
    def call() -> torch.Tensor:
      return forward(x, t, text, return_dict=False)[0]

    return call

  # The largest first: time may end before the others.
  for batch in sorted(options.batches, reverse=True):
    facts = {"mode": options.mode}
    name = f"diffusers call batch {batch}"
    yield torch_timing.Case(name, batch, lambda batch=batch: build(batch), facts)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=pathlib.Path, help="of a model in diffusers' form")
  parser.add_argument("batches", type=int, nargs="+", help="batch sizes")
  parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU")
  parser.add_argument("--seconds", type=float, default=1e6, help="of the whole run")
  modes = ("default", "reduce-overhead", "max-autotune", "eager")
  parser.add_argument("--mode", choices=modes, default="reduce-overhead")
  options = parser.parse_args()
  torch.set_float32_matmul_precision("high")
  torch_timing.run(cases(options), options.seconds)


if __name__ == "__main__":
  main()
