"""Reader of .safetensors files, with bounds on what their header claims, and writer.

The format: the length of the header in 8 bytes, little-endian; the header, JSON that
gives type, shape and place of each tensor; the tensors, one after another.
Source: https://github.com/huggingface/safetensors.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import IO, Annotated

import ml_dtypes
import msgspec
import numpy as np

from sdiff_jax.io import bounded, file_io
from sdiff_jax.types import Array, Json

MAX_HEADER = 100_000_000  # bytes, as in the original implementation
MAX_TENSORS = 2**17
METADATA = "__metadata__"
ALIGNMENT = 8  # bytes of the first tensor's place
DTYPES = {
  "BOOL": np.bool_,
  "U8": np.uint8,
  "I8": np.int8,
  "U16": np.uint16,
  "I16": np.int16,
  "U32": np.uint32,
  "I32": np.int32,
  "U64": np.uint64,
  "I64": np.int64,
  "F16": np.float16,
  "F32": np.float32,
  "F64": np.float64,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
  "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
Size = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class Unsupported(ValueError):
  """A tensor has a type that is not read."""


class _Tensor(msgspec.Struct):
  """What the header says of a tensor."""

  dtype: str
  shape: Annotated[list[Size], msgspec.Meta(max_length=32)]
  data_offsets: tuple[Size, Size]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor of a file, which is not read yet.

  Attributes:
    path: of the file.
    position: of its first byte.
    dtype: of its numbers.
    shape: of the tensor.
  """

  path: str
  position: int
  dtype: np.dtype
  shape: tuple[int, ...]

  def read(self) -> np.ndarray:
    """Returns the tensor.

    Raises:
      OSError: the file cannot be read.
      EOFError: the file has become shorter.
    """
    with bounded.open_regular(self.path) as file:
      return _read(file, self)


def read(file: IO[bytes]) -> dict[str, np.ndarray]:
  """Returns the tensors of a file by name.

  Args:
    file: an open .safetensors file, at its start.

  Raises:
    Unsupported: a tensor has a type that is not read.
    ValueError: the file is damaged, or its header claims more than it holds.
    EOFError: the file is truncated.
  """
  return {name: _read(file, x) for name, x in stored(file, "").items()}


def stored(file: IO[bytes], path: str) -> dict[str, StoredTensor]:
  """Returns where the tensors of a file lie, by name; only the header is read.

  Args:
    file: an open .safetensors file, at its start.
    path: of the file.

  Raises:
    Unsupported: a tensor has a type that is not read.
    ValueError: the file is damaged, or its header claims more than it holds.
  """
  size = bounded.stored_size(file)
  length = int.from_bytes(file.read(8), "little")
  bounded.check_inside(length, min(size - 8, MAX_HEADER), "the header")
  entries = _entries(file.read(length))
  available = size - 8 - length
  tensors, position = {}, 0
  for name, entry in entries:
    begin, end = entry.data_offsets
    dtype, label = np.dtype(DTYPES[entry.dtype]), bounded.short(name, 80)
    if begin != position:
      raise ValueError(f"the tensor {label} does not follow the one before it")
    if end - begin != math.prod(entry.shape) * dtype.itemsize:
      raise ValueError(f"the tensor {label} has not the bytes of its shape")
    bounded.check_inside(end, available, f"the tensor {label}")
    if not math.prod(entry.shape) and max(entry.shape) >= 2**32:
      raise ValueError(f"the tensor {label} has the shape {entry.shape}")
    tensors[name] = StoredTensor(path, 8 + length + begin, dtype, tuple(entry.shape))
    position = end
  if position != available:
    raise ValueError(f"{available - position} bytes follow the last tensor")
  return tensors


def metadata(file: IO[bytes]) -> dict[str, str]:
  """Returns the texts in the header of a file by name, {} if it has none.

  Args:
    file: an open .safetensors file, at its start.

  Raises:
    ValueError: the file is damaged, or its header claims more than it holds.
  """
  size = bounded.stored_size(file)
  length = int.from_bytes(file.read(8), "little")
  bounded.check_inside(length, min(size - 8, MAX_HEADER), "the header")
  content = msgspec.json.decode(file.read(length), type=dict[str, Json])
  found = content.get(METADATA)
  texts = found.items() if isinstance(found, dict) else ()
  return {name: text for name, text in texts if isinstance(text, str)}


def write(
  path: file_io.Path,
  tensors: Mapping[str, np.ndarray | Array],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes tensors to a file atomically, one after another.

  Args:
    path: of the file.
    tensors: by name; an array of JAX is fetched when it is written.
    metadata: texts by name, such as {"format": "pt"}, without which transformers refuses
      a file.

  Raises:
    ValueError: a tensor has a type that the format does not have.

  Example:
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "x.safetensors")
    >>> write(path, {"w": np.arange(3, dtype=np.int8)})
    >>> with open(path, "rb") as file:
    ...   read(file)
    {'w': array([0, 1, 2], dtype=int8)}
  """
  header: dict[str, Json] = {METADATA: dict(metadata)} if metadata else {}
  # Wide types first, so that every tensor is aligned.
  names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
  position = 0
  for name in names:
    x = tensors[name]
    if x.dtype not in NAMES:
      raise ValueError(f"tensors: {name} has the type {x.dtype}, which is not stored")
    end = position + math.prod(x.shape) * x.dtype.itemsize
    entry = {"dtype": NAMES[x.dtype], "shape": [*x.shape]}
    header[name] = entry | {"data_offsets": [position, end]}
    position = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % ALIGNMENT)
  with file_io.atomic(path) as temporary, open(temporary, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
      file.write(np.ascontiguousarray(tensors[name]).tobytes())


def _read(file: IO[bytes], tensor: StoredTensor) -> np.ndarray:
  """Returns a tensor of an open file."""
  data = np.empty(math.prod(tensor.shape) * tensor.dtype.itemsize, np.uint8)
  file.seek(tensor.position)
  if file.readinto(data) != len(data):  # type: ignore[attr-defined]
    raise EOFError("a tensor ends too early")
  return data.view(tensor.dtype).reshape(tensor.shape)


def _entries(header: bytes) -> list[tuple[str, _Tensor]]:
  """Returns names and descriptions of the tensors, in the order of their places."""
  content = msgspec.json.decode(header, type=dict[str, Json])
  content.pop(METADATA, None)
  if len(content) > MAX_TENSORS:
    raise ValueError(f"the header has {len(content)} tensors")
  entries = []
  for name, value in content.items():
    label = bounded.short(name, 80)
    if len(name) > 1000:
      raise ValueError(f"the name {label} has {len(name)} characters")
    try:
      entry = msgspec.convert(value, _Tensor)
    except msgspec.ValidationError as error:
      raise ValueError(f"the tensor {label}: {bounded.short(error, 100)}") from error
    if entry.dtype not in DTYPES:
      raise Unsupported(
        f"the tensor {label} has the type {bounded.short(entry.dtype, 40)}, which is not "
        f"supported; convert it to one of {', '.join(DTYPES)}"
      )
    entries.append((name, entry))
  return sorted(entries, key=lambda pair: pair[1].data_offsets)
