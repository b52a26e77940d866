"""Weights, folders in the diffusers format and policies: valid files, and their readers."""

import functools
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import _valid_files as valid
import numpy as np

from sdiff_jax.pretrained import diffusion_policy, lerobot
from sdiff_jax.pretrained.diffusers import (
  dit_checkpoint,
  json_tokenizer,
  loading,
  lora_file,
  networks,
  prompts,
  tokenizer,
)
from sdiff_jax.pretrained.files import sharded, state_dict


def _tensors(name: str) -> Callable[[str], Any]:
  return lambda folder: state_dict.read(os.path.join(folder, name))


def _shards() -> valid.Files:
  """Returns an index and two files of weights."""
  files = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
  index = {"metadata": {"total_size": 40}, "weight_map": {"a": files[0], "b": files[1]}}
  return {
    "model.safetensors.index.json": json.dumps(index).encode(),
    files[0]: valid.safetensors({"a": np.ones((3, 2))}),
    files[1]: valid.safetensors({"b": np.zeros(4)}),
  }


def _read_shards(folder: str) -> None:
  tensors = sharded.stored(os.path.join(folder, "model.safetensors.index.json"))
  like = {name: np.zeros(x.shape[::-1]) for name, x in tensors.items()}
  state_dict.match_params(tensors, like, lambda keys: keys[0])


@functools.cache
def _unet() -> Any:
  net = loading.network(str(valid.FIXTURES / "tiny-sd2" / "unet"))
  return networks.abstract_params(net.init, dtype="float32")


def _read_lora(folder: str) -> None:
  lora_file.load(os.path.join(folder, lora_file.FILE), _unet(), part="unet")


def _flow_scheduler() -> valid.Files:
  config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
  config |= {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
  config |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}
  return {"scheduler_config.json": json.dumps(config).encode()}


def _canaries() -> valid.Files:
  """Returns files of weights that carry code."""
  files = {
    f"{protocol}.pkl": pickle.dumps({"ema": valid.Canary("os")}, protocol)
    for protocol in range(6)
  }
  files["eval.pkl"] = pickle.dumps({"state_dict": valid.Canary("eval")})
  inside = io.BytesIO()
  with zipfile.ZipFile(inside, "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({"w": valid.Canary("os")}))
    archive.writestr("archive/version", "3")
  objects = np.array([valid.Canary("os")], dtype=object)
  array = io.BytesIO()
  np.save(array, objects, allow_pickle=True)
  archive_of_objects = io.BytesIO()
  with zipfile.ZipFile(archive_of_objects, "w") as archive:
    archive.writestr("arr_0.npy", array.getvalue())
  files |= {"zip.pt": inside.getvalue(), "objects.npz": archive_of_objects.getvalue()}
  return files


def _all_weights(folder: str) -> None:
  """Reads all files of a folder as weights, and raises the last error."""
  from sdiff_jax.types import UserError

  last: UserError | None = None
  for name in sorted(os.listdir(folder)):
    try:
      state_dict.read(os.path.join(folder, name))
    except UserError as error:
      last = error
  if last is not None:
    raise last


def _lerobot() -> valid.Files:
  with np.load(valid.FIXTURES / "dp_unet1d.npz") as arrays:
    tensors = {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}
  named = {}
  for name, x in tensors.items():
    name = name.replace("blocks.0.block", "conv1.block")
    name = name.replace("blocks.1.block", "conv2.block").replace(".2.conv.", ".2.")
    named[f"diffusion.unet.{name}"] = x
  for kind, size in (("min", -1.0), ("max", 1.0)):
    for feature, n in (("observation_state", 4), ("observation_environment_state", 16)):
      named[f"normalize_inputs.buffer_{feature}.{kind}"] = np.full(n, size, np.float32)
    named[f"unnormalize_outputs.buffer_action.{kind}"] = np.full(2, size, np.float32)
  config = {
    "type": "diffusion",
    "n_obs_steps": 2,
    "horizon": 16,
    "n_action_steps": 8,
    "input_features": {
      "observation.state": {"type": "STATE", "shape": [4]},
      "observation.environment_state": {"type": "ENV", "shape": [16]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [2]}},
    "normalization_mapping": dict.fromkeys(("STATE", "ENV", "ACTION"), "MIN_MAX"),
    "down_dims": [16, 32, 48],
    "diffusion_step_embed_dim": 32,
    "noise_scheduler_type": "DDIM",
    "num_inference_steps": 10,
  }
  return {
    "model.safetensors": valid.safetensors(named),
    "config.json": json.dumps(config).encode(),
  }


def _policy() -> valid.Files:
  with np.load(valid.FIXTURES / "dp_unet1d.npz") as arrays:
    tensors = {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}
  file = {f"ema_model.model.{k}": v for k, v in tensors.items()}
  for name, n in (("obs", 20), ("action", 2)):
    head = f"ema_model.normalizer.params_dict.{name}"
    file |= {f"{head}.scale": np.ones(n), f"{head}.offset": np.zeros(n)}
  return {"policy.safetensors": valid.safetensors(file)}


def _captions() -> valid.Files:
  annotations = [{"image_id": k, "id": k, "caption": f"a cat {k}"} for k in range(3)]
  return {"x.json": json.dumps({"annotations": annotations}).encode()}


SD2 = ("safetensors", "legacy", "transformers5", "expected")
READERS: dict[str, valid.Reader] = {
  "weights safetensors": valid.Reader(
    valid.fixture("weights/file.safetensors"), _tensors("file.safetensors"), 10
  ),
  "weights old pt": valid.Reader(
    valid.fixture("weights/old.pt"), _tensors("old.pt"), 10
  ),
  "weights zip pt": valid.Reader(
    valid.fixture("weights/zip.pt"), _tensors("zip.pt"), 10
  ),
  "weights edm": valid.Reader(
    valid.fixture("weights/edm.pkl"), _tensors("edm.pkl"), 10
  ),
  "weights dit": valid.Reader(
    valid.fixture("weights/dit.pt"),
    lambda folder: dit_checkpoint.load(os.path.join(folder, "dit.pt")),
    3,
  ),
  "weights npz": valid.Reader(
    lambda: {"x.npz": valid.npz(a=np.ones((3, 2)), b=np.zeros(4))}, _tensors("x.npz"), 6
  ),
  "weights shards": valid.Reader(_shards, _read_shards, 10),
  "weights lora": valid.Reader(
    valid.fixture(f"tiny-lora/{lora_file.FILE}"), _read_lora, 4
  ),
  "weights canaries": valid.Reader(_canaries, _all_weights, 6),
  "lerobot": valid.Reader(_lerobot, lerobot.load, 3),
  "lerobot config": valid.Reader(_lerobot, lerobot.load, 3, ("config.json",)),
  "diffusion policy": valid.Reader(
    _policy,
    lambda folder: diffusion_policy.load(os.path.join(folder, "policy.safetensors")),
    2,
  ),
  "diffusers configs": valid.Reader(
    valid.tree("tiny-sd2", *SD2),
    lambda folder: loading.abstract(loading.configs(folder)),
    2,
    (
      *("model_index.json", "unet/config.json", "vae/config.json"),
      *("text_encoder/config.json", "scheduler/scheduler_config.json"),
    ),
  ),
  "diffusers sd3 configs": valid.Reader(
    valid.tree("tiny-sd3", "safetensors", "expected"),
    lambda folder: loading.abstract(loading.configs(folder)),
    1,
    (
      *("model_index.json", "transformer/config.json", "vae/config.json"),
      *("text_encoder_2/config.json", "text_encoder_3/config.json"),
    ),
  ),
  "diffusers sdxl configs": valid.Reader(
    valid.tree("tiny-sdxl", "safetensors", "expected"),
    lambda folder: loading.abstract(loading.configs(folder)),
    1,
    ("model_index.json", "unet/config.json", "text_encoder_2/config.json"),
  ),
  "diffusers sana configs": valid.Reader(
    valid.tree("tiny-sana", "safetensors", "expected"),
    lambda folder: loading.abstract(loading.configs(folder)),
    1,
    (
      *("model_index.json", "transformer/config.json", "vae/config.json"),
      *("text_encoder/config.json", "scheduler/scheduler_config.json"),
    ),
  ),
  "diffusers flux": valid.Reader(valid.tree("tiny-flux", "expected"), loading.load, 1),
  "t5 tokenizer": valid.Reader(
    valid.tree("tiny-flux/tokenizer_2"),
    lambda folder: json_tokenizer.load(folder, 8),
    4,
  ),
  "diffusers church": valid.Reader(
    valid.tree("tiny-ddpm-church", "expected"), loading.load, 1
  ),
  "autoencoder": valid.Reader(valid.tree("tiny-sd2/vae"), loading.autoencoder, 1),
  "scheduler": valid.Reader(
    valid.fixture("tiny-sd2/scheduler/scheduler_config.json"), loading.schedule, 8
  ),
  "flow scheduler": valid.Reader(_flow_scheduler, loading.schedule, 6),
  "tokenizer": valid.Reader(valid.tree("tiny-sd2/tokenizer"), tokenizer.load, 8),
  "captions": valid.Reader(
    _captions, lambda folder: prompts.read(os.path.join(folder, "x.json")), 4
  ),
}
