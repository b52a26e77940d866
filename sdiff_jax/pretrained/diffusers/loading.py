"""Models in a folder of the diffusers format: networks, tokenizer and schedule.

A folder has model_index.json, which names the parts, and a folder for each part with
its config and weights; a model with one network may have all in one folder.
"""

import json
import os
from typing import Any, NamedTuple

from sdiff_jax.pretrained.diffusers import (
  clip_text,
  scheduler,
  unet2d,
  unet2d_condition,
  vae,
)
from sdiff_jax.pretrained.diffusers import networks as networks_lib
from sdiff_jax.pretrained.diffusers import tokenizer as tokenizer_lib
from sdiff_jax.pretrained.diffusers.networks import Predictor
from sdiff_jax.pretrained.files import state_dict
from sdiff_jax.types import Params, UserError

HUB = "hf://"
PARTS = ("unet", "vae", "text_encoder")  # with a network
NETWORKS = {  # class -> module
  "UNet2DConditionModel": unet2d_condition,
  "UNet2DModel": unet2d,
  "AutoencoderKL": vae,
  "CLIPTextModel": clip_text,
}
# Files of weights; the first that exists is read.
FILES = [
  f"{stem}{precision}.{end}"
  for end, stems in (
    ("safetensors", ("diffusion_pytorch_model", "model")),
    ("bin", ("diffusion_pytorch_model", "pytorch_model")),
  )
  for precision in ("", ".fp16")
  for stem in stems
]


class Model(NamedTuple):
  """The parts of a folder; None for a part that it does not have.

  Attributes:
    unet: the network that is sampled from.
    vae: latents to images.
    text_encoder: tokens to the condition "text" of the U-Net.
    params: of the networks, by the names of these fields.
    tokenizer: texts to tokens.
    schedule: the process of the U-Net, and its solver.
  """

  unet: Predictor
  vae: vae.Autoencoder | None
  text_encoder: clip_text.TextEncoder | None
  params: dict[str, Params]
  tokenizer: tokenizer_lib.Tokenizer | None
  schedule: scheduler.Schedule


def load(path: str, *, dtype: str = "float32", remat: str = "") -> Model:
  """Returns the model of a folder, its weights on the host.

  Args:
    path: of the folder; hf://organisation/name is fetched from the Hugging Face hub.
    dtype: of the hidden layers and of the weights.
    remat: what a block computes again in the backward pass: "" nothing, "dots" all
      but products and convolutions, "full" everything (see layers.KEEPS).

  Raises:
    UserError: files that are missing or damaged, or a list of all that does not fit:
      unknown fields, values that are not supported, weights missing or left over.
  """
  folder = _local(path)
  index = _json(os.path.join(folder, "model_index.json"))
  classes = {k: v[1] for k, v in index.items() if isinstance(v, list)}
  if "unet" not in classes or "scheduler" not in classes:
    raise UserError(f"{folder}/model_index.json: names no unet, or no scheduler")
  parts = [name for name in Model._fields if classes.get(name) in NETWORKS]
  problems, networks, params = [], {}, {}
  for name in PARTS:
    if classes.get(name) and name not in parts:
      problems.append(f"{name}: {classes[name]} is none of {', '.join(NETWORKS)}")
  for name in parts:
    try:
      networks[name] = network(_part(folder, name), dtype=dtype, remat=remat)
    except UserError as error:
      problems.append(str(error))
  try:
    schedule = _schedule(_part(folder, "scheduler"))
  except UserError as error:
    problems.append(str(error))
  for name in [] if problems else parts:
    try:
      params[name] = parameters(_part(folder, name), networks[name], dtype=dtype)
    except UserError as error:
      problems.append(str(error))
  problems += _misfits(folder, networks)
  if problems:
    raise UserError("; ".join(problems))
  tokenizer = None
  if classes.get("tokenizer"):
    tokenizer = _tokenizer(_part(folder, "tokenizer"), networks.get("text_encoder"))
  networks = {name: networks.get(name) for name in PARTS}
  return Model(**networks, params=params, tokenizer=tokenizer, schedule=schedule)


def configs(path: str) -> dict[str, dict[str, Any]]:
  """Returns what the config files of a folder say, as `abstract` takes it.

  Raises:
    UserError: a file is missing or damaged.
  """
  folder = _local(path, weights=False)
  index = _json(os.path.join(folder, "model_index.json"))
  files = dict.fromkeys(PARTS, "config.json") | {"scheduler": "scheduler_config.json"}
  return {
    name: _json(os.path.join(_part(folder, name), file))
    for name, file in files.items()
    if isinstance(index.get(name), list)
  }


def abstract(
  configs: dict[str, dict[str, Any]], *, dtype: str = "float32", remat: str = ""
) -> Model:
  """Returns the model of what its config files say, its weights as shapes alone.

  Args:
    configs: contents of config.json for "unet" and, where there are, "vae" and
      "text_encoder"; of scheduler_config.json for "scheduler".
    dtype: of the hidden layers and of the weights.
    remat: as in `load`.

  Raises:
    UserError: a config that does not fit.
  """
  networks = {
    name: _of_config(configs[name], name, dtype=dtype, remat=remat)
    for name in PARTS
    if name in configs
  }
  params = {
    k: networks_lib.abstract_params(n.init, dtype=dtype) for k, n in networks.items()
  }
  try:
    schedule = scheduler.from_config(configs["scheduler"])
  except ValueError as error:
    raise UserError(f"scheduler: {error}") from error
  networks = {name: networks.get(name) for name in PARTS}
  return Model(**networks, params=params, tokenizer=None, schedule=schedule)


def autoencoder(path: str, *, dtype: str = "float32") -> tuple[vae.Autoencoder, Params]:
  """Returns the autoencoder of a folder, or of its folder vae, and its weights.

  Args:
    path: of the folder, or hf://organisation/name.
    dtype: of the hidden layers and of the weights.

  Raises:
    UserError: files that are missing or damaged, or another network.
  """
  folder = _part(_local(path), "vae")
  found = network(folder, dtype=dtype)
  if not isinstance(found, vae.Autoencoder):
    raise UserError(f"{folder} holds no AutoencoderKL: name the folder of one")
  return found, parameters(folder, found, dtype=dtype)


def network(folder: str, *, dtype: str = "float32", remat: str = "") -> Any:
  """Returns the network of the config.json of a folder, without its weights.

  Returns:
    What `from_config` returns in the module for its class (see NETWORKS).

  Raises:
    UserError: the file is missing or damaged, or does not fit.
  """
  path = os.path.join(folder, "config.json")
  return _of_config(_json(path), path, dtype=dtype, remat=remat)


def _of_config(config: dict[str, Any], path: str, *, dtype: str, remat: str) -> Any:
  """Returns the network of a config; `path` is named in errors."""
  names = [config.get("_class_name"), *config.get("architectures", ())]
  known = [NETWORKS[name] for name in names if name in NETWORKS]
  if not known:
    raise UserError(f"{path}: {names} is none of {', '.join(NETWORKS)}")
  try:
    return known[0].from_config(config, dtype=dtype, remat=remat)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error


def parameters(folder: str, network: Any, *, dtype: str = "float32") -> Params:
  """Returns the parameters of a network from the weights of a folder.

  Raises:
    UserError: the file is missing or damaged, or weights that do not fit.
  """
  for name in FILES:
    path = os.path.join(folder, name)
    if os.path.exists(path):
      found = state_dict.read(path)
      return networks_lib.load_state_dict(found, network.init, dtype=dtype, path=path)
  raise UserError(f"{folder} has no weights: there is none of {', '.join(FILES)}")


def _misfits(folder: str, networks: dict[str, Any]) -> list[str]:
  """Returns what is wrong between the parts."""
  unet, encoder = networks.get("unet"), networks.get("text_encoder")
  if unet is None or encoder is None or unet.text in (None, encoder.width):
    return []
  return [
    f"{folder}: the unet takes a text of width {unet.text}, the text_encoder makes one "
    f"of {encoder.width}"
  ]


def _schedule(folder: str) -> scheduler.Schedule:
  path = os.path.join(folder, "scheduler_config.json")
  try:
    return scheduler.from_config(_json(path))
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error


def _tokenizer(
  folder: str, encoder: clip_text.TextEncoder | None
) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer, checked against the encoder of its tokens."""
  if encoder is None:
    return tokenizer_lib.load(folder)
  found = tokenizer_lib.load(folder, encoder.length)
  if found.size > encoder.vocabulary:
    raise UserError(
      f"{folder} has {found.size} tokens, the text encoder {encoder.vocabulary}: they "
      "do not belong together"
    )
  return found


def _part(folder: str, name: str) -> str:
  """Returns the folder of a part, which may be the whole one."""
  part = os.path.join(folder, name)
  return part if os.path.isdir(part) else folder


def _local(path: str, *, weights: bool = True) -> str:
  """Returns a folder on this machine, fetched if the path asks for it.

  Args:
    path: of the folder, or hf://organisation/name.
    weights: fetch them too: of each part, the file that `parameters` reads.
  """
  if path.startswith(HUB):
    try:
      import huggingface_hub
    except ImportError:
      raise UserError(
        f"{path} needs the package huggingface_hub: pip install 'sdiff_jax[diffusers]'"
      ) from None
    name = path.removeprefix(HUB)
    try:
      every = huggingface_hub.list_repo_files(name)
      wanted = [f for f in every if f.endswith((".json", ".txt"))]
      wanted += _first_weights(every) if weights else []
      return huggingface_hub.snapshot_download(name, allow_patterns=wanted)
    except Exception as error:  # of the net, of the hub, or of the name
      raise UserError(f"{path} was not fetched: {error}") from error
  if not os.path.isdir(path):
    raise UserError(f"{path}: no such folder")
  return path


def _first_weights(every: list[str]) -> list[str]:
  """Returns the file that `parameters` reads in every folder that has one."""
  found = {}
  for file in every:
    folder, name = os.path.split(file)
    if name in FILES:
      found.setdefault(folder, []).append(name)
  return [os.path.join(k, min(v, key=FILES.index)) for k, v in found.items()]


def _json(path: str) -> dict[str, Any]:
  try:
    with open(path, encoding="utf-8") as file:
      found = json.load(file)
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}") from None
  except ValueError as error:
    raise UserError(f"{path} is damaged: {error}") from None
  if not isinstance(found, dict):
    raise UserError(f"{path} is damaged: not a dict")
  return found
