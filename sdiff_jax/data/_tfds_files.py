"""Folders of TensorFlow Datasets: found and checked before that package reads them.

TensorFlow Datasets imports whatever module features.json names. So the types of features
are compared with a list first; and all files must be regular and their descriptions of a
bounded size.
"""

import os
import re
from typing import Annotated, NotRequired, TypedDict

import msgspec

from sdiff_jax.io import bounded, file_io, records, storage
from sdiff_jax.types import Json, UserError

FEATURES, INFO = "features.json", "dataset_info.json"
MAX_DESCRIPTION = 2**24  # bytes of .json and .txt files
MAX_FILES = 10**6
MODULE = "tensorflow_datasets.core.features."
TYPES = frozenset(
  MODULE + name
  for name in (
    "bounding_boxes.BBoxFeature",
    "class_label_feature.ClassLabel",
    "dataset_feature.Dataset",
    "features_dict.FeaturesDict",
    "image_feature.Image",
    "labeled_image.LabeledImage",
    "scalar.Scalar",
    "sequence_feature.Sequence",
    "tensor_feature.Tensor",
    "text_feature.Text",
  )
)
TYPE_KEYS = ("pythonClassName", "python_class_name", "type")
VERSION = re.compile(r"\d+\.\d+\.\d+")
NAME = re.compile(r"(\w+)(?:/(?!\d+\.)([\w.\-]+))?(?:[:/](\d+\.\d+\.\d+))?")


class Split(TypedDict):
  """A split in dataset_info.json; there are more fields."""

  name: records.Name
  shardLengths: Annotated[list[str | int], msgspec.Meta(max_length=MAX_FILES)]
  filepathTemplate: NotRequired[str]


class Info(TypedDict):
  """Content of dataset_info.json; there are more fields."""

  name: records.Name
  version: Annotated[str, msgspec.Meta(pattern=r"^\d+\.\d+\.\d+$")]
  splits: Annotated[list[Split], msgspec.Meta(max_length=1000)]
  fileFormat: NotRequired[str]


def find(name: str, data_dir: str) -> str | None:
  """Returns the folder of a prepared data set, None if there is none.

  Args:
    name: NAME, NAME/CONFIG, each with or without :VERSION; without a version it is the
      newest, and without a config the only one.
    data_dir: where data sets were prepared.

  Raises:
    ValueError: the name has another form, or there are several configs.
  """
  match = NAME.fullmatch(name)
  if match is None:
    raise ValueError(
      f"tfds_name={bounded.short(name, 60)!r}: must be NAME[/CONFIG][:VERSION]"
    )
  base, config, version = match.groups()
  folder = os.path.join(data_dir, base)
  if config:
    folder = os.path.join(folder, config)
  versions = _versions(folder)
  if not versions and not config:
    configs = [entry for entry in _folders(folder) if _versions(f"{folder}/{entry}")]
    if len(configs) > 1:
      raise ValueError(
        f"tfds_name={name!r}: name one of its configs, such as "
        f"{base}/{bounded.short(configs[0], 60)}"
      )
    if configs:
      folder = os.path.join(folder, configs[0])
      versions = _versions(folder)
  if version:
    return os.path.join(folder, version) if version in versions else None
  newest = max(versions, key=lambda v: [*map(int, v.split("."))], default=None)
  return newest and os.path.join(folder, newest)


def check(folder: str) -> None:
  """Checks the files of a data set.

  Args:
    folder: of the data set, with features.json and dataset_info.json.

  Raises:
    UserError: a file is no regular file, too large, damaged, or names a type of features
      that is not read.
  """
  for name in sorted(storage.listdir(folder)):
    path = os.path.join(folder, name)
    if storage.isdir(path):
      continue
    size = file_io.regular_size(path)
    if name.endswith((".json", ".txt")) and size > MAX_DESCRIPTION:
      raise UserError(f"{path} has more than {MAX_DESCRIPTION} bytes")
  remedy = "prepare the data set again"
  path = os.path.join(folder, FEATURES)
  features = records.read(path, dict[str, Json], remedy, max_bytes=MAX_DESCRIPTION)
  _check_types(path, features, 0)
  path = os.path.join(folder, INFO)
  info = records.read(path, Info, remedy, max_bytes=MAX_DESCRIPTION)
  for split in info["splits"]:
    template = split.get("filepathTemplate", "")
    if "/" in template or ".." in template:
      raise UserError(
        f"{path}: filepathTemplate={bounded.short(template, 60)!r} leads out of the "
        "folder"
      )
    for length in split["shardLengths"]:
      number = str(length)
      if not number.isascii() or not number.isdigit() or len(number) > 12:
        raise UserError(f"{path}: shardLengths has {records.quoted(length)}; {remedy}")


def _check_types(path: str, value: Json, depth: int) -> None:
  """Refuses types of features that are not in the list, and compression inside others.

  Args:
    path: of the file.
    value: a part of it.
    depth: number of types of features around it.
  """
  if isinstance(value, list):
    for each in value:
      _check_types(path, each, depth)
  if not isinstance(value, dict):
    return
  for key in TYPE_KEYS:
    name = value.get(key)
    if isinstance(name, str):
      if name not in TYPES:
        raise UserError(
          f"{path}: the feature type {bounded.short(name, 80)!r} is not read; prepare "
          "the data set without this feature"
        )
      depth += 1
  if str(value.get("encoding", "")).lower() == "zlib" and depth > 2:
    raise UserError(f"{path}: compressed arrays inside other features are not read")
  for each in value.values():
    _check_types(path, each, depth)


def _folders(folder: str) -> list[str]:
  """Returns the names of the folders in a folder, [] if it is none."""
  try:
    names = sorted(storage.listdir(folder))
  except OSError:
    return []
  return [name for name in names if storage.isdir(os.path.join(folder, name))]


def _versions(folder: str) -> list[str]:
  """Returns the versions below a folder that are described."""
  return [
    name
    for name in _folders(folder)
    if VERSION.fullmatch(name) and storage.lexists(f"{folder}/{name}/{FEATURES}")
  ]
