"""Images in many .npz files and an index of them, as the job `sample` of a pod leaves them.

Image k is row `row[k]` of the array `images` of the file `names[shard[k]]`, so that no
process ever holds more than the files that it reads at present.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sdiff_jax.io import array_io, bounded, file_io, storage
from sdiff_jax.types import UserError

INDEX = "index.npz"
CACHED = 16  # files whose images stay in memory
REMEDY = "remove the folder, and sample again"


class Index(NamedTuple):
  """Where N images are.

  Attributes:
    names: of the files, relative to the folder of the index.
    shard: number of the file of each image, int [N].
    row: row of each image in that file, int [N].
    labels: class of each image, -1 for none, int [N].
    shape: of an image, [H, W, C].
  """

  names: Sequence[str]
  shard: np.ndarray
  row: np.ndarray
  labels: np.ndarray
  shape: tuple[int, ...]


def exists(folder: str) -> bool:
  """Returns whether a folder has an index.

  Example:
    >>> exists("nothing/here")
    False
  """
  return storage.lexists(os.path.join(folder, INDEX))


def write(folder: str, index: Index) -> None:
  """Writes the index of the files of a folder; it is what makes them a data set."""
  arrays = {name: np.asarray(value) for name, value in index._asdict().items()}
  file_io.write_npz(os.path.join(folder, INDEX), **arrays)


def read(folder: str) -> Index:
  """Returns the index of a folder.

  Raises:
    UserError: it is missing or damaged.
  """
  path = os.path.join(folder, INDEX)
  if not exists(folder):
    raise UserError(
      f"{folder} is a folder without {INDEX}: name an .npz, or the samples.parts of a "
      "job `sample` that has finished"
    )
  arrays = array_io.read_npz(path, Index._fields)
  if missing := [name for name in Index._fields if name not in arrays]:
    raise UserError(f"{path} has no {missing[0]}; {REMEDY}")
  if not _fits(**arrays):
    raise UserError(f"{path} is no index of images; {REMEDY}")
  names, *numbers, shape = (arrays[name] for name in Index._fields)
  return Index(names.tolist(), *numbers, tuple(shape.tolist()))


def _fits(
  names: np.ndarray,
  shard: np.ndarray,
  row: np.ndarray,
  labels: np.ndarray,
  shape: np.ndarray,
) -> bool:
  """Returns whether arrays of a file are those of an index."""
  numbers = (shard, row, labels)
  if names.dtype.kind != "U" or names.ndim != 1 or shape.shape != (3,):
    return False
  if any(x.dtype.kind not in "iu" for x in (*numbers, shape)) or not shard.size:
    return False
  if any(x.ndim != 1 or x.shape != shard.shape for x in numbers):
    return False
  plain = all(os.path.basename(name) == name for name in names.tolist())
  inside = shard.min() >= 0 and shard.max() < len(names) and row.min() >= 0
  return plain and inside and all(0 < n < 2**16 for n in shape.tolist())


def reader(folder: str, index: Index) -> Callable[[np.ndarray], np.ndarray]:
  """Returns indices int [n] -> images uint8 [n, H, W, C]; it raises UserError."""

  @functools.lru_cache(CACHED)
  def images_of(shard: int) -> np.ndarray:
    path = os.path.join(folder, index.names[shard])
    images = array_io.read_npz(path, ("images",)).get("images")
    if images is None or images.dtype != np.uint8 or images.shape[1:] != index.shape:
      raise UserError(f"{path}: has no images uint8 {index.shape}; {REMEDY}")
    return images

  def read_images(indices: np.ndarray) -> np.ndarray:
    shards, rows = index.shard[indices], index.row[indices]
    bounded.check_memory(len(indices) * int(np.prod(index.shape)))
    out = np.empty((len(indices), *index.shape), np.uint8)
    for shard in np.unique(shards):
      mine = shards == shard
      images = images_of(int(shard))
      if rows[mine].max() >= len(images):
        raise UserError(f"{folder}: {INDEX} is not that of its files; {REMEDY}")
      out[mine] = images[rows[mine]]
    return out

  return read_images


def fingerprint(folder: str, index: Index) -> bytes:
  """Returns a digest of the images, by the checksums that the files hold of them."""
  digest = hashlib.sha256(repr((index.shape, index.names)).encode())
  for numbers in (index.shard, index.row, index.labels):
    digest.update(np.ascontiguousarray(numbers, np.int64).data)
  for name in index.names:
    checksum = array_io.checksum(os.path.join(folder, name), "images")
    digest.update(checksum.to_bytes(4, "little"))
  return digest.digest()
