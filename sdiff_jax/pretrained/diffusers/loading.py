"""Models in a folder of the diffusers format: networks, tokenizer and schedule.

A folder has model_index.json, which names the parts, and a folder for each part with
its config and weights; a model with one network may have all in one folder.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from msgspec import Meta

from sdiff_jax.pretrained.diffusers import (
  clip_text,
  flux_transformer,
  scheduler,
  sd3_transformer,
  unet2d,
  unet2d_condition,
  vae,
)
from sdiff_jax.pretrained.diffusers import networks as networks_lib
from sdiff_jax.pretrained.diffusers import tokenizer as tokenizer_lib
from sdiff_jax.pretrained.diffusers import weights as weights_lib
from sdiff_jax.pretrained.diffusers.flow_scheduler import FlowSchedule
from sdiff_jax.pretrained.diffusers.networks import Predictor
from sdiff_jax.pretrained.diffusers.scheduler import Schedule
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Field
from sdiff_jax.types import Json, Params, PyTree, UserError

HUB = "hf://"
MAX_MESSAGE = 470  # characters, of all problems of a folder
PROBLEM = 100, 190  # least and most characters of one of several problems
Class = Annotated[list[str | None], Meta(min_length=2, max_length=2)]
INDEX = {  # model_index.json: part -> [library, class]
  name: Field(None, Class | None)
  for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
}
NAMES = {  # of config.json: what names the class of the network
  "_class_name": Field(None, str | None),
  "architectures": Field((), list[str] | None),
}
PARTS = ("unet", "vae", "text_encoder")  # with a network
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
NETWORKS = {  # class -> module
  "UNet2DConditionModel": unet2d_condition,
  "UNet2DModel": unet2d,
  "SD3Transformer2DModel": sd3_transformer,
  "FluxTransformer2DModel": flux_transformer,
  "AutoencoderKL": vae,
  "CLIPTextModel": clip_text,
}
CLASSES = {"tokenizer": TOKENIZERS, "scheduler": scheduler.NAMES}


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
  schedule: Schedule | FlowSchedule


def load(
  path: str,
  *,
  dtype: str = "float32",
  remat: str = "",
  place: Callable[[Params], PyTree] | None = None,
) -> Model:
  """Returns the model of a folder, with its weights.

  Args:
    path: of the folder; hf://organization/name is downloaded from the Hugging Face Hub.
    dtype: of the hidden layers and of the weights.
    remat: what a block recomputes in the backward pass: "" nothing, "dots" everything
      but matrix products and convolutions, "full" everything.
    place: shapes of the parameters of a part -> their shardings, and every tensor goes to
      its devices as soon as it is read; None for weights on the host.

  Raises:
    UserError: a file is missing or damaged; or lists unknown fields, unsupported values,
      and weights that are missing or left over, of all parts.
  """
  folder = _local(path)
  classes = _classes(folder)
  parts = [name for name in PARTS if name in classes]
  problems, networks, params = [], {}, {}
  for name in parts:
    try:
      networks[name] = network(_part(folder, name), dtype=dtype, remat=remat)
    except UserError as error:
      problems.append(str(error))
  try:
    process = schedule(_part(folder, "scheduler"), classes["scheduler"])
  except UserError as error:
    problems.append(str(error))
  for name in [] if problems else parts:
    try:
      params[name] = weights_lib.parameters(
        _part(folder, name), networks[name], dtype=dtype, place=place
      )
    except UserError as error:
      problems.append(str(error))
  problems = _misfits(networks) + problems
  if problems:
    raise UserError(_listed(folder, problems))
  tokenizer = None
  if classes.get("tokenizer"):
    tokenizer = _tokenizer(_part(folder, "tokenizer"), networks.get("text_encoder"))
  networks = {name: networks.get(name) for name in PARTS}
  return Model(**networks, params=params, tokenizer=tokenizer, schedule=process)


def configs(path: str) -> dict[str, dict[str, Json]]:
  """Returns the contents of the config files of a folder, for `abstract`.

  Raises:
    UserError: a file is missing or damaged.
  """
  folder = _local(path, weights=False)
  classes = _classes(folder)
  files = dict.fromkeys(PARTS, "config.json") | {"scheduler": "scheduler_config.json"}
  return {
    name: config_fields.read_config(os.path.join(_part(folder, name), file))
    for name, file in files.items()
    if classes.get(name)
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
  return coder, weights_lib.parameters(folder, coder, dtype=dtype)


def network(folder: str, *, dtype: str = "float32", remat: str = "") -> Any:
  """Returns the network of the config.json of a folder, without its weights.

  Returns:
    Result of `from_config` of the module of its class (see NETWORKS).

  Raises:
    UserError: the file is missing or damaged, or does not fit.
  """
  path = os.path.join(folder, "config.json")
  return _network_from_config(
    config_fields.read_config(path), path, dtype=dtype, remat=remat
  )


def _network_from_config(
  config: dict[str, Json], path: str, *, dtype: str, remat: str
) -> Any:
  """Returns the network of a config; messages of errors start with `path`."""
  try:
    names = config_fields.validated_config(
      {name: config[name] for name in NAMES if name in config}, NAMES, {}
    )
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
  names = [names["_class_name"], *(names["architectures"] or ())]
  modules = [NETWORKS[name] for name in names if name in NETWORKS]
  if not modules:
    raise UserError(
      f"{path}: {config_fields.quoted(names)} is none of {', '.join(NETWORKS)}"
    )
  try:
    return modules[0].from_config(config, dtype=dtype, remat=remat)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error


def _classes(folder: str) -> dict[str, str]:
  """Returns the class of each part that model_index.json names.

  Raises:
    UserError: the file is missing or damaged, or names no network or no scheduler.
  """
  path = os.path.join(folder, "model_index.json")
  index = config_fields.read_config(path)
  for name in ("unet", "scheduler"):
    if not isinstance(index.get(name), list):
      raise UserError(f"{path}: names no unet, or no scheduler")
  try:
    parts = config_fields.validated_config(
      {name: index[name] for name in INDEX if name in index}, INDEX, {}
    )
    classes = {name: part[1] for name, part in parts.items() if part and part[1]}
    for name in ("unet", "scheduler"):
      if name not in classes:
        raise ValueError(f"{name}={index[name]}: must name a class")
    for name, class_name in classes.items():
      known = CLASSES.get(name, NETWORKS)
      if class_name not in known:
        raise ValueError(
          f"{name}: {config_fields.quoted(class_name, str)} is none of {', '.join(known)}"
        )
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
  return classes


def _listed(folder: str, problems: list[str]) -> str:
  """Returns all problems of a folder in one line, each cut to its part of it."""
  problems = [problem.removeprefix(f"{folder}/") for problem in problems]
  left, parts = MAX_MESSAGE - len(folder), []
  for problem, rest in zip(problems, reversed(range(len(problems))), strict=True):
    room = max(min(PROBLEM[1], left - PROBLEM[0] * rest), PROBLEM[0] // 2)
    parts.append(config_fields.quoted(problem, str, room))
    left -= len(parts[-1])
  return f"{folder}: " + "; ".join(parts)


def _misfits(networks: dict[str, Any]) -> list[str]:
  """Returns inconsistencies between the parts."""
  unet, vae_, encoder = (networks.get(name) for name in PARTS)
  problems = []
  if (
    unet is not None and encoder is not None and unet.text not in (None, encoder.width)
  ):
    problems.append(
      f"the unet takes text embeddings of size {unet.text}, the text_encoder returns "
      f"{encoder.width}"
    )
  if unet is not None and vae_ is not None and unet.shape[-1] != vae_.channels:
    problems.append(
      f"the unet has in_channels={unet.shape[-1]}, the vae latent_channels="
      f"{vae_.channels}"
    )
  return problems


def schedule(folder: str, class_name: str = "") -> Schedule | FlowSchedule:
  """Returns the process of the scheduler_config.json of a folder.

  Args:
    folder: of the part.
    class_name: that model_index.json names; if the file names another one, that of the
      file is used and stderr says so.

  Raises:
    UserError: the file is missing or damaged, or does not fit.
  """
  path = os.path.join(folder, "scheduler_config.json")
  try:
    config = config_fields.read_config(path)
    process = scheduler.from_config(config)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
  if class_name not in ("", config["_class_name"]):
    print(
      f"{path}: uses its _class_name={config['_class_name']}; model_index.json names "
      f"{class_name}",
      file=sys.stderr,
    )
  return process


def _tokenizer(
  folder: str, encoder: clip_text.TextEncoder | None
) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer, checked against the encoder of its tokens."""
  if encoder is None:
    return tokenizer_lib.load(folder)
  tokenizer = tokenizer_lib.load(folder, encoder.length)
  if tokenizer.size > encoder.vocabulary or tokenizer.last >= encoder.vocabulary:
    raise UserError(
      f"{folder} has {max(tokenizer.size, tokenizer.last + 1)} tokens, the text encoder "
      f"{encoder.vocabulary}: they do not belong together"
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
    weights: whether to download weights: for each part the files that are read.
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
      patterns += weights_lib.to_fetch(files) if weights else []
      return huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # of the network, of the Hub, or a wrong name
      raise UserError(f"{path}: the download failed: {error}") from error
  if not os.path.isdir(path):
    raise UserError(f"{path}: no such folder")
  return path
