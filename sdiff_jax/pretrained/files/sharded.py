"""Weights in several files, and the index that says which tensor lies in which file.

The index is a JSON file with a mapping `weight_map`: name of a tensor -> name of a
.safetensors file beside it.
"""

import os
from collections.abc import Mapping
from typing import Annotated, NotRequired, TypedDict

from msgspec import Meta

from sdiff_jax.io import bounded, records
from sdiff_jax.pretrained.files import state_dict
from sdiff_jax.pretrained.files.state_dict import Tensor
from sdiff_jax.types import Json, UserError

# No separator of folders: shards lie beside the index.
ShardName = Annotated[str, Meta(max_length=255, pattern=r"^[^/\\]+\.safetensors$")]
WeightMap = Annotated[
  dict[records.Name, ShardName], Meta(min_length=1, max_length=2**17)
]
REMEDY = "fetch it again from where the weights come from"


class Index(TypedDict):
  """Content of an index."""

  metadata: NotRequired[Json]
  weight_map: WeightMap


def stored(path: str) -> Mapping[str, Tensor]:
  """Returns the tensors of an index by name; only the headers of its files are read.

  Args:
    path: of the index, such as model.safetensors.index.json.

  Raises:
    UserError: the index or one of its files is missing or damaged, or a file lacks a
      tensor.
  """
  places = records.read(path, Index, REMEDY, any_number=True)["weight_map"]
  folder = os.path.dirname(path)
  shards = {}
  for shard in sorted({*places.values()}):
    file = os.path.join(folder, shard)
    if not os.path.exists(file):
      raise UserError(f"{file} does not exist, but {path} names it; {REMEDY}")
    shards[shard] = state_dict.stored(file)
  tensors = {}
  for name, shard in places.items():
    if name not in shards[shard]:
      label = bounded.short(name, 80)
      raise UserError(
        f"{os.path.join(folder, shard)} lacks the tensor {label}, which {path} "
        f"places there; {REMEDY}"
      )
    tensors[name] = shards[shard][name]
  return tensors
