"""Arrays of zarr's format 2: a folder with .zarray and one file for each chunk.

`zarr` decodes with any codec that is registered, of which one unpickles. Here a codec is
one of a short list, an array has no filters, and the bytes of a chunk are bounded before
it is decompressed.
"""

import bz2
import itertools
import lzma
import math
import os
import struct
from collections.abc import Callable
from typing import Annotated, Literal, NotRequired, TypedDict

import msgspec
import numpy as np

from sdiff_jax.io import bounded, records
from sdiff_jax.types import Json

METADATA = ".zarray"
MAX_CHUNKS = 10**6
Size = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
Axes = msgspec.Meta(min_length=1, max_length=8)


class Metadata(TypedDict):
  """Content of .zarray."""

  zarr_format: Literal[2]
  shape: Annotated[list[Size], Axes]
  chunks: Annotated[list[Positive], Axes]
  dtype: Annotated[str, msgspec.Meta(pattern="^[<>|](f[248]|[iu][1248])$")]
  compressor: dict[str, Json] | None
  fill_value: float | str | None
  order: Literal["C", "F"]
  filters: list[dict[str, Json]] | None
  dimension_separator: NotRequired[Literal[".", "/"]]


def exists(path: str) -> bool:
  """Returns whether a folder is an array."""
  return os.path.lexists(os.path.join(path, METADATA))


def read(path: str) -> np.ndarray:
  """Returns an array.

  Args:
    path: of its folder.

  Raises:
    UserError: .zarray is damaged or missing.
    ValueError: the array has filters or another codec, or claims more than its files
      hold.
    OSError: a chunk cannot be read.
  """
  options = {"any_number": True}
  about = records.read(
    os.path.join(path, METADATA), Metadata, "save it again", **options
  )
  if about["filters"]:
    raise ValueError(f"filters={bounded.short(about['filters'], 80)} are not supported")
  decode = _decoder(about["compressor"])
  shape, chunks, dtype = about["shape"], about["chunks"], np.dtype(about["dtype"])
  if len(chunks) != len(shape):
    raise ValueError(f"chunks={chunks} and shape={shape} have different lengths")
  counts = [-(-n // m) for n, m in zip(shape, chunks, strict=True)]
  if math.prod(counts) > MAX_CHUNKS:
    raise ValueError(f"it claims {math.prod(counts)} chunks")
  separator = about.get("dimension_separator", ".")
  names = {
    index: os.path.join(path, separator.join(map(str, index)))
    for index in itertools.product(*map(range, counts))
  }
  files = {index: name for index, name in names.items() if os.path.lexists(name)}
  stored = sum(os.stat(name).st_size for name in files.values())
  bounded.check_expansion(math.prod(shape) * dtype.itemsize, stored, "the array")
  chunk_size = math.prod(chunks) * dtype.itemsize
  if files:
    bounded.check_expansion(chunk_size, stored, "a chunk")
  fill = 0 if about["fill_value"] is None else float(about["fill_value"])
  array = np.full(shape, fill, dtype, order=about["order"])
  for index, name in files.items():
    with bounded.open_regular(name) as file:
      data = decode(file.read(stored + 1), chunk_size)
    if len(data) != chunk_size:
      raise ValueError(f"{name} has {len(data)} bytes and not {chunk_size}")
    chunk = np.frombuffer(data, dtype).reshape(chunks, order=about["order"])
    starts = [i * m for i, m in zip(index, chunks, strict=True)]
    inside = tuple(
      slice(start, min(start + m, n))
      for start, m, n in zip(starts, chunks, shape, strict=True)
    )
    array[inside] = chunk[tuple(slice(s.stop - s.start) for s in inside)]
  return array


Decode = Callable[
  [bytes, int], bytes
]  # (data, number of bytes of the result) -> result


def _decoder(compressor: dict[str, Json] | None) -> Decode:
  """Returns the decompression that .zarray names.

  Raises:
    ValueError: it is none of those that are supported.
  """
  if compressor is None:
    return lambda data, size: data
  name = compressor.get("id")
  if not isinstance(name, str) or name not in DECODERS:
    raise ValueError(
      f"compressor={bounded.short(repr(name), 60)} is not supported; use one of "
      f"{', '.join(DECODERS)}"
    )
  return DECODERS[name]


def _blosc(data: bytes, size: int) -> bytes:
  from numcodecs import blosc  # needed only here

  # Version, flags, sizes of an element, of the result, of a block, and of the data.
  if len(data) < 16 or struct.unpack_from("<L", data, 4)[0] != size:
    raise ValueError("a chunk has another size than .zarray says")
  if struct.unpack_from("<L", data, 12)[0] != len(data):
    raise ValueError("a chunk is truncated")
  return bytes(blosc.decompress(data, bytearray(size)))


def _lz4(data: bytes, size: int) -> bytes:
  from numcodecs import lz4  # needed only here

  if len(data) < 4 or struct.unpack_from("<L", data)[0] != size:
    raise ValueError("a chunk has another size than .zarray says")
  return bytes(lz4.decompress(data, bytearray(size)))


def _zstd(data: bytes, size: int) -> bytes:
  from numcodecs import zstd  # needed only here

  return bytes(zstd.decompress(data, bytearray(size)))


DECODERS: dict[str, Decode] = {
  "blosc": _blosc,
  "lz4": _lz4,
  "zstd": _zstd,
  "gzip": lambda data, size: bounded.inflate(data, size, 31),
  "zlib": lambda data, size: bounded.inflate(data, size, 15),
  "bz2": lambda data, size: bz2.BZ2Decompressor().decompress(data, size + 1),
  "lzma": lambda data, size: lzma.LZMADecompressor(memlimit=2**27).decompress(
    data, size + 1
  ),
}
