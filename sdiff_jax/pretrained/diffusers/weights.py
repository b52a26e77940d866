"""Files of the weights of a network in the diffusers format."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from sdiff_jax.pretrained.diffusers import networks as networks_lib
from sdiff_jax.pretrained.files import sharded, state_dict
from sdiff_jax.pretrained.files.state_dict import Tensor
from sdiff_jax.types import Params, PyTree, UserError

STEMS = {  # of files of weights, by their ends
  "safetensors": ("diffusion_pytorch_model", "model"),
  "bin": ("diffusion_pytorch_model", "pytorch_model"),
}
VARIANTS = ("", ".fp16", ".bf16")
INDEX_END = ".json"
# Files of weights -> start of the names of their shards; the first that exists is read.
FILES = {
  name: f"{stem}{variant}-"
  for end, stems in STEMS.items()
  for variant in VARIANTS
  for stem in stems
  for name in (
    f"{stem}{variant}.{end}",
    *([f"{stem}.{end}.index{variant}{INDEX_END}"] if end == "safetensors" else []),
  )
}


def parameters(
  folder: str,
  network: Any,
  *,
  dtype: str = "float32",
  place: Callable[[Params], PyTree] | None = None,
) -> Params:
  """Returns the parameters of a network from the weights of a folder.

  Args:
    folder: of the part.
    network: with its `init`.
    dtype: of the parameters.
    place: see `load`.

  Raises:
    UserError: the file is missing or damaged, or the weights do not fit the network.
  """
  path, tensors = stored(folder)
  return networks_lib.load_state_dict(
    tensors, network.init, dtype=dtype, path=path, place=place
  )


def stored(folder: str) -> tuple[str, Mapping[str, Tensor]]:
  """Returns the path of the weights of a folder, or of their index, and the tensors.

  Those of .safetensors are not read yet.

  Args:
    folder: of the part.

  Raises:
    UserError: the file is missing or damaged.
  """
  for name in FILES:
    path = os.path.join(folder, name)
    if os.path.exists(path):
      read = sharded.stored if name.endswith(INDEX_END) else state_dict.stored
      return path, read(path)
  plain = [f"{stem}.{end}" for end, stems in STEMS.items() for stem in stems]
  raise UserError(
    f"{folder} has no weights: there is none of {', '.join(plain)}, no index of shards, "
    "and no variant fp16 or bf16"
  )


def to_fetch(files: list[str]) -> list[str]:
  """Returns the file that `parameters` reads, or its shards, of every folder.

  Args:
    files: paths of all files.

  Example:
    >>> to_fetch(["vae/config.json", "vae/model.safetensors", "vae/pytorch_model.bin"])
    ['vae/model.safetensors']
  """
  by_folder: dict[str, list[str]] = {}
  for file in files:
    folder, name = os.path.split(file)
    by_folder.setdefault(folder, []).append(name)
  found = []
  for folder, names in by_folder.items():
    first = next((name for name in FILES if name in names), "")
    shards = [n for n in names if first and n.startswith(FILES[first])]
    read = shards if first.endswith(INDEX_END) else [first] * bool(first)
    found += [os.path.join(folder, name) for name in read]
  return found
