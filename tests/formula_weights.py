"""Weights by a formula, so that fixtures of large networks hold their outputs alone."""

import json
import math
import pathlib
import shutil
import zlib

import numpy as np

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
MASK = 0xFFFFFFFF


def uniform(name: str, size: int) -> np.ndarray:
  """Returns u in [-1, 1) for a name and each position, float64 [size]: a hash."""
  h = np.arange(size, dtype=np.uint64) * np.uint64(2654435761)
  h = (h + np.uint64(zlib.crc32(name.encode()))) & np.uint64(MASK)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    h ^= h >> np.uint64(shift)
    h = (h * np.uint64(factor)) & np.uint64(MASK)
  h ^= h >> np.uint64(16)
  return (h >> np.uint64(8)).astype(np.float64) * 2.0**-23 - 1


def inception(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns a tensor of FID's Inception-v3 by its name in the released file."""
  u = uniform(name, math.prod(shape)).reshape(shape)
  if name == "fc.weight":
    u *= math.sqrt(3 / shape[1])
  elif name == "fc.bias":
    u *= 0.1
  elif name.endswith("conv.weight"):
    u *= math.sqrt(6 / math.prod(shape[1:]))
  elif name.endswith("bn.weight"):
    u = 1 + 0.3 * u
  elif name.endswith("running_var"):
    u = 1 + 0.5 * u
  else:
    u *= 0.2
  return u.astype(np.float32)


def transformer(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns a tensor of a vision or text transformer."""
  u = uniform(name, math.prod(shape)).reshape(shape)
  if len(shape) > 1:
    u *= math.sqrt(3 / math.prod(shape[1:]))
  else:
    gain = name.endswith((".weight", "lambda1", "gamma"))
    u = 1 + 0.3 * u if gain else 0.2 * u
  return u.astype(np.float32)


def clip_folder(folder: pathlib.Path, kind: str = "clip") -> pathlib.Path:
  """Writes a small CLIP of transformers, or with the kind "open_clip" of open_clip."""
  with np.load(FIXTURES / "vision_features.npz") as arrays:
    about = json.loads(str(arrays["meta"]))
  shutil.copytree(FIXTURES / "tiny-sd2" / "tokenizer", folder)
  prefix = "open_clip_" if kind == "open_clip" else ""
  (folder / f"{prefix}config.json").write_text(json.dumps(about[f"{kind}_config"]))
  shapes = about["shapes"][kind].items()
  np.savez(folder / "x.npz", **{k: transformer(k, tuple(v)) for k, v in shapes})
  # The form is told by the contents.
  (folder / "x.npz").rename(folder / f"{prefix}pytorch_model.bin")
  return folder
