"""Folders in the diffusers format, written from parameters and parts of other folders."""

import os
import re
import shutil
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sdiff_jax.io import downloads, file_io
from sdiff_jax.pretrained.diffusers import networks, weights
from sdiff_jax.pretrained.files import config_fields, safetensors_file, to_tensors
from sdiff_jax.types import Json, Params, UserError

INDEX = "model_index.json"
COPIED = (".json", ".model", ".txt")  # ends of files that are no weights
LIBRARIES = {  # library of a class -> stem of its weights
  "diffusers": "diffusion_pytorch_model",
  "transformers": "model",
}
# Fields of config.json that name the type of the weights, which may be another one now.
TYPES = ("dtype", "torch_dtype")
# Layers of diffusers that are 1x1 convolutions, and matrices here.
CONVOLUTIONS = r"conv[^.]*\.weight$"
PROJECTIONS = r"\.proj_(in|out)\.weight$"  # around transformers, unless a U-Net says no
# Without this, transformers refuses a file.
METADATA = {"format": "pt"}


class Part(NamedTuple):
  """One part of a folder: a network, a tokenizer or a scheduler.

  Attributes:
    library: of its class, as model_index.json has it.
    class_name: its class.
    folder: where files are copied from; "" for none.
    configs: name of a JSON file -> its content, in place of a copy.
    tensors: weights in PyTorch's layout, in place of copies; {} for a part without, or
      with copied ones.
  """

  library: str
  class_name: str
  folder: str = ""
  configs: Mapping[str, dict[str, Json]] = {}
  tensors: Mapping[str, np.ndarray] = {}


def network(
  config: dict[str, Json],
  params: Params,
  *,
  shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Part:
  """Returns the part that is a network of `loading.NETWORKS`.

  Args:
    config: content of its config.json, which names its class.
    params: of the network.
    shapes: of tensors by name, where a matrix is a 1x1 convolution (see `shapes`); without
      them it is one in layers named conv, and around the transformers of U-Nets.

  Example:
    >>> config = {"_class_name": "UNet2DModel"}
    >>> part = network(config, {"conv_in": {"bias": np.zeros(2)}})
    >>> part.library, [*part.tensors]
    ('diffusers', ['conv_in.bias'])
  """
  name = config.get("_class_name")
  library = "diffusers" if name else "transformers"
  tensors = to_tensors.from_params(params, networks.to_state_dict, shapes)
  if shapes is None:
    linear = name != "UNet2DConditionModel" or config.get("use_linear_projection")
    pattern = CONVOLUTIONS if linear else f"{CONVOLUTIONS}|{PROJECTIONS}"
    for k, x in tensors.items():
      if x.ndim == 2 and re.search(pattern, k):
        tensors[k] = x[..., None, None]
  class_name = name or config["architectures"][0]
  config = {k: v for k, v in config.items() if k not in TYPES}
  return Part(library, class_name, configs={"config.json": config}, tensors=tensors)


def scheduler(config: dict[str, Json]) -> Part:
  """Returns the part that is a scheduler.

  Args:
    config: content of its scheduler_config.json, which names its class.

  Example:
    >>> scheduler({"_class_name": "LCMScheduler"}).class_name
    'LCMScheduler'
  """
  files = {"scheduler_config.json": config}
  return Part("diffusers", config["_class_name"], configs=files)


def shapes(folder: str) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the tensors of a part, by their present names.

  Args:
    folder: of the part.

  Raises:
    UserError: the folder has no weights, or damaged ones.
  """
  _, tensors = weights.stored(folder)
  return {networks.present_name(name): x.shape for name, x in tensors.items()}


def read(folder: str) -> tuple[dict[str, Json], dict[str, Part]]:
  """Returns the index of a folder, and its parts as copies.

  Args:
    folder: of the diffusers format.

  Returns:
    Fields of model_index.json that are no parts, such as "_class_name"; name -> part.

  Raises:
    UserError: the index is missing or damaged.
  """
  folder = downloads.local(folder)
  path = os.path.join(folder, INDEX)
  index, parts = config_fields.read_config(path), {}
  for name, value in [*index.items()]:
    if isinstance(value, list) and len(value) == 2 and all(value):
      where = os.path.join(folder, name)
      if not os.path.isdir(where):
        raise UserError(
          f"{path}: names {config_fields.quoted(name, str)}: no such folder"
        )
      parts[name] = Part(*map(str, value), where)
      del index[name]
  return index, parts


def save(folder: str, index: Mapping[str, Json], parts: Mapping[str, Part]) -> None:
  """Writes a folder that diffusers loads.

  model_index.json is written last, so a folder that has one is complete.

  Args:
    folder: where; existing files of the same names are replaced.
    index: fields of model_index.json that are no parts: "_class_name" is the pipeline.
    parts: by the names of their folders.

  Raises:
    UserError: a part has neither weights nor a folder that has some.
  """
  for name, part in parts.items():
    where = os.path.join(folder, name)
    if part.folder:
      _copy(part, where)
    for file, content in part.configs.items():
      config_fields.write_config(os.path.join(where, file), content)
    if part.tensors:
      file = f"{LIBRARIES[part.library]}.safetensors"
      safetensors_file.write(os.path.join(where, file), part.tensors, METADATA)
  classes = {name: [part.library, part.class_name] for name, part in parts.items()}
  config_fields.write_config(os.path.join(folder, INDEX), {**index, **classes})


def _copy(part: Part, where: str) -> None:
  """Copies the files of a part but those that are written."""
  files = os.listdir(part.folder)
  kept = [f for f in files if f.endswith(COPIED) and f not in weights.FILES]
  names = {file: file for file in kept if file not in part.configs}
  first = next((name for name in weights.FILES if name in files), "")
  if part.tensors:
    first = ""
  if first.endswith(weights.INDEX_END):
    names |= {file: file for file in (first, *weights.to_fetch(files))}
  elif first:  # without the name of its variant, which diffusers would have to be told
    names[first] = first.split(".")[0] + os.path.splitext(first)[1]
  for file in names:
    with file_io.atomic(os.path.join(where, names[file])) as temporary:
      shutil.copyfile(os.path.join(part.folder, file), temporary)
