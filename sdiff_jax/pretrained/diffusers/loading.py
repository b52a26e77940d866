"""Models in a folder of the diffusers format: networks, tokenizer and schedule.

A folder has model_index.json, which names the parts, and a folder for each part with
its config and weights; a model with one network may have all in one folder.
"""

import os
from typing import Any, NamedTuple

from sdiff_jax.io import records
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
from sdiff_jax.types import Json, Params, UserError

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
  """The parts of a folder; None for a missing part.

  Attributes:
    unet: predicts the noise, v or x0.
    vae: decodes latents to images.
    text_encoder: maps tokens to the condition "text" of the U-Net.
    params: of the networks, by the names of these fields.
    tokenizer: maps texts to tokens.
    schedule: the diffusion process of the U-Net, and its solver.
  """

  unet: Predictor
  vae: vae.Autoencoder | None
  text_encoder: clip_text.TextEncoder | None
  params: dict[str, Params]
  tokenizer: tokenizer_lib.Tokenizer | None
  schedule: scheduler.Schedule


def load(path: str, *, dtype: str = "float32", remat: str = "") -> Model:
  """Returns the model of a folder, with its weights on the host.

  Args:
    path: of the folder; hf://organization/name is downloaded from the Hugging Face Hub.
    dtype: of the hidden layers and of the weights.
    remat: what a block recomputes in the backward pass: "" nothing, "dots" everything
      but matrix products and convolutions, "full" everything.

  Raises:
    UserError: a file is missing or damaged; or lists unknown fields, unsupported values,
      and weights that are missing or left over, of all parts.
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


def configs(path: str) -> dict[str, dict[str, Json]]:
  """Returns the contents of the config files of a folder, for `abstract`.

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
  configs: dict[str, dict[str, Json]], *, dtype: str = "float32", remat: str = ""
) -> Model:
  """Returns the model of its config files, with abstract weights.

  Args:
    configs: contents of config.json for "unet" and optionally "vae" and
      "text_encoder"; of scheduler_config.json for "scheduler".
    dtype: of the hidden layers and of the weights.
    remat: as in `load`.

  Raises:
    UserError: a config is not supported.
  """
  networks = {
    name: _network_from_config(configs[name], name, dtype=dtype, remat=remat)
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
  """Returns the autoencoder of a folder, or of its subfolder vae, and its weights.

  Args:
    path: of the folder, or hf://organization/name.
    dtype: of the hidden layers and of the weights.

  Raises:
    UserError: a file is missing or damaged, or the network is no autoencoder.
  """
  folder = _part(_local(path), "vae")
  coder = network(folder, dtype=dtype)
  if not isinstance(coder, vae.Autoencoder):
    raise UserError(f"{folder}: holds no AutoencoderKL")
  return coder, parameters(folder, coder, dtype=dtype)


def network(folder: str, *, dtype: str = "float32", remat: str = "") -> Any:
  """Returns the network of the config.json of a folder, without its weights.

  Returns:
    Result of `from_config` of the module of its class (see NETWORKS).

  Raises:
    UserError: the file is missing or damaged, or does not fit.
  """
  path = os.path.join(folder, "config.json")
  return _network_from_config(_json(path), path, dtype=dtype, remat=remat)


def _network_from_config(
  config: dict[str, Json], path: str, *, dtype: str, remat: str
) -> Any:
  """Returns the network of a config; messages of errors start with `path`."""
  names = [config.get("_class_name"), *config.get("architectures", ())]
  modules = [NETWORKS[name] for name in names if name in NETWORKS]
  if not modules:
    raise UserError(f"{path}: {names} is none of {', '.join(NETWORKS)}")
  try:
    return modules[0].from_config(config, dtype=dtype, remat=remat)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error


def parameters(folder: str, network: Any, *, dtype: str = "float32") -> Params:
  """Returns the parameters of a network from the weights of a folder.

  Raises:
    UserError: the file is missing or damaged, or the weights do not fit the network.
  """
  for name in FILES:
    path = os.path.join(folder, name)
    if os.path.exists(path):
      tensors = state_dict.read(path)
      return networks_lib.load_state_dict(tensors, network.init, dtype=dtype, path=path)
  raise UserError(f"{folder} has no weights: there is none of {', '.join(FILES)}")


def _misfits(folder: str, networks: dict[str, Json]) -> list[str]:
  """Returns inconsistencies between the parts."""
  unet, encoder = networks.get("unet"), networks.get("text_encoder")
  if unet is None or encoder is None or unet.text in (None, encoder.width):
    return []
  return [
    f"{folder}: the unet takes text embeddings of size {unet.text}, the text_encoder "
    f"returns {encoder.width}"
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
  tokenizer = tokenizer_lib.load(folder, encoder.length)
  if tokenizer.size > encoder.vocabulary:
    raise UserError(
      f"{folder} has {tokenizer.size} tokens, the text encoder {encoder.vocabulary}: they "
      "do not belong together"
    )
  return tokenizer


def _part(folder: str, name: str) -> str:
  """Returns the subfolder of a part, or the folder itself if there is none."""
  part = os.path.join(folder, name)
  return part if os.path.isdir(part) else folder


def _local(path: str, *, weights: bool = True) -> str:
  """Returns a local folder, after downloading it from the Hub if need be.

  Args:
    path: of the folder, or hf://organization/name.
    weights: whether to download weights: for each part the file that `parameters` reads.
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
      files = huggingface_hub.list_repo_files(name)
      patterns = [f for f in files if f.endswith((".json", ".txt"))]
      patterns += _first_weights(files) if weights else []
      return huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # of the network, of the Hub, or a wrong name
      raise UserError(f"{path}: the download failed: {error}") from error
  if not os.path.isdir(path):
    raise UserError(f"{path}: no such folder")
  return path


def _first_weights(files: list[str]) -> list[str]:
  """Returns the file that `parameters` reads, of every folder that has one."""
  by_folder = {}
  for file in files:
    folder, name = os.path.split(file)
    if name in FILES:
      by_folder.setdefault(folder, []).append(name)
  return [os.path.join(k, min(v, key=FILES.index)) for k, v in by_folder.items()]


def _json(path: str) -> dict[str, Json]:
  """Returns the dict of a JSON file."""
  config = records.read_json(path)
  if not isinstance(config, dict):
    raise UserError(f"{path} is damaged: not a dict")
  return config
