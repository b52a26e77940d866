"""Makes tests/fixtures/tiny-lora: adapters of the U-Net of tiny-sd2, and its outputs.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers transformers peft
  /tmp/torch/bin/python third_party/diffusers_lora.py [FILE]

With FILE, which this package wrote, the output by that file is compared with the stored
one instead.
"""

import pathlib
import sys

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

FIXTURES = pathlib.Path(__file__).parents[1] / "tests" / "fixtures"
FOLDER = FIXTURES / "tiny-lora"
RANK, ALPHA = 2, 3
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"]


def output(unet, arrays: dict) -> np.ndarray:
  x, time, text = (torch.from_numpy(arrays[k]) for k in ("x", "time", "text"))
  return unet(x, time, text).sample.numpy()


def main() -> None:
  unet = UNet2DConditionModel.from_pretrained(FIXTURES / "tiny-sd2" / "unet")
  rng = np.random.default_rng(0)
  shapes = {"x": (2, 4, 8, 8), "text": (2, 12, 24)}
  arrays = {k: rng.standard_normal(s, np.float32) for k, s in shapes.items()}
  arrays["time"] = np.array([999.0, 250.0], np.float32)
  plain = output(unet, arrays)
  if len(sys.argv) > 1:
    path = pathlib.Path(sys.argv[1])
    pipe = StableDiffusionPipeline.from_pretrained(FIXTURES / "tiny-sd2", unet=unet)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    with np.load(FOLDER / "expected.npz") as expected:
      difference = np.abs(output(pipe.unet, arrays) - expected["output"]).max()
    print(f"largest difference: {difference:.2g}; without: {np.abs(plain).max():.2g}")
    return
  config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
  unet.add_adapter(config)
  torch.manual_seed(0)
  for name, p in unet.named_parameters():
    if "lora" in name:
      p.data = 0.3 * torch.randn_like(p)
  arrays["output"] = output(unet, arrays)
  layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
  StableDiffusionPipeline.save_lora_weights(
    FOLDER,
    unet_lora_layers=layers,
    unet_lora_adapter_metadata=config.to_dict(),
  )
  np.savez_compressed(FOLDER / "expected.npz", **arrays)
  print(
    f"{FOLDER}: {len(layers)} tensors, changed by "
    f"{np.abs(arrays['output'] - plain).max():.2g} of {np.abs(plain).max():.2g}"
  )


if __name__ == "__main__":
  with torch.no_grad():
    main()
