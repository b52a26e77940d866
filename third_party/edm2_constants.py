"""Makes tests/fixtures/edm2_constants.npz: EDM2's network with other constants.

  git clone https://github.com/NVlabs/edm2 /tmp/edm2
  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy
  /tmp/torch/bin/python third_party/edm2_constants.py --edm2=/tmp/edm2

Each run changes one constant of the constructor, with the same weights where their shapes
allow it. Outputs are those of `Precond` in float32.
"""

import argparse
import json
import pathlib
import sys
import zlib

import numpy as np
import torch

FILE = pathlib.Path(__file__).parents[1] / "tests" / "fixtures" / "edm2_constants.npz"
SIZES = {"img_resolution": 8, "img_channels": 2, "label_dim": 3, "model_channels": 8}
SIZES |= {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
SIZES |= {"channels_per_head": 8}
CONSTANTS = {
  "default": {},
  "label_balance": {"label_balance": 0.2},
  "concat_balance": {"concat_balance": 0.7},
  "res_balance": {"res_balance": 0.6},
  "attn_balance": {"attn_balance": 0.8},
  "clip_act": {"clip_act": 0.5},
  "no_clip": {"clip_act": None},
  "channels_per_head": {"channels_per_head": 4},
  "resample_filter": {"resample_filter": [1, 3, 3, 1]},
  "asymmetric_filter": {"resample_filter": [1, 2, 5, 1]},
  "multipliers": {"channel_mult_noise": 3, "channel_mult_emb": 1},
  "logvar_channels": {"logvar_channels": 24},
}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--edm2", required=True, help="a checkout of NVlabs/edm2")
  sys.path.insert(0, parser.parse_args().edm2)
  from training.networks_edm2 import Precond

  rng = np.random.default_rng(0)
  inputs = {
    "x": rng.standard_normal((3, 2, 8, 8), np.float32),
    "sigma": np.float32([0.05, 0.5, 20.0]),
    "labels": np.array([0, 2, -1]),
  }
  one_hot = np.eye(4, dtype=np.float32)[inputs["labels"]][:, :3]  # -1 has no class
  arrays, weights = {**inputs}, {}
  for name, changed in CONSTANTS.items():
    network = Precond(**SIZES | changed).eval()
    with torch.no_grad():
      for key, x in network.state_dict().items():
        draw = np.random.default_rng(zlib.crc32(key.encode()))
        scale = 6 if key.endswith(("freqs", "phases")) else 1
        x.copy_(torch.from_numpy(np.asarray(scale * draw.standard_normal(x.shape))))
    tensors = {k: v.numpy().copy() for k, v in network.state_dict().items()}
    for key, x in tensors.items():
      if key in weights and np.array_equal(weights[key], x):
        continue
      if key in weights:
        arrays[f"{name}/w/{key}"] = x
      else:
        weights[key] = arrays[f"w/{key}"] = x
    with torch.no_grad():
      D, logvar = network(
        torch.from_numpy(inputs["x"]),
        torch.from_numpy(inputs["sigma"]),
        torch.from_numpy(one_hot),
        force_fp32=True,
        return_logvar=True,
      )
    arrays[f"{name}/D"] = D.numpy()
    arrays[f"{name}/logvar"] = logvar.numpy()[:, 0, 0, 0]
  configs = {name: SIZES | changed for name, changed in CONSTANTS.items()}
  np.savez_compressed(FILE, **arrays, configs=json.dumps(configs))
  print(f"{FILE}: {len(CONSTANTS)} runs, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
  main()
