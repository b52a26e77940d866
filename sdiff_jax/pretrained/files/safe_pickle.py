"""A restricted unpickler for files of PyTorch and of EDM, which runs no code of theirs.

A pickle is a program that may call any function. Here the globals that files of weights
need are replaced by the inert objects of `STAND_INS`, and any other global is refused.

`torch.load(weights_only=True)` would need PyTorch, and refuses the pickled modules of
EDM and EDM2 and the pickled NumPy statistics of EDM2.
"""

import io
import math
import pickle
import struct
from collections.abc import Callable
from typing import IO, Any

import ml_dtypes
import numpy as np

from sdiff_jax.types import Json

Unpickled = Any  # what a pickle can hold

MAGIC = 0x1950A86A20F9469CFC6C  # first in PyTorch's format without zip
STORAGES = {  # of PyTorch
  "Double": "float64",
  "Float": "float32",
  "Half": "float16",
  "BFloat16": "bfloat16",
  "Long": "int64",
  "Int": "int32",
  "Short": "int16",
  "Char": "int8",
  "Byte": "uint8",
  "Bool": "bool",
}
NUMPY = {"f8": "float64", "f4": "float32", "f2": "float16"}  # NumPy's dtype names


class Refused(Exception):
  """A file has content that files of weights do not need."""


def legacy(file: IO[bytes]) -> Unpickled:
  """Returns the object of a .pt file without zip archive, after its magic number.

  The storages follow the object, in the order of a list of their keys.
  """
  begin = file.tell()
  size = file.seek(0, io.SEEK_END) - begin
  file.seek(begin)
  storages = {}

  def load(kind: str, key: str, numel: int) -> np.ndarray:
    if key not in storages:
      of = dtype(kind)
      check(0 <= numel * of.itemsize <= size, "a storage larger than the file")
      storages[key] = np.zeros(numel, of)
    return storages[key]

  check(Unpickler(file).load() == 1001, "an unknown version of PyTorch's format")
  check(Unpickler(file).load()["little_endian"], "big-endian bytes")
  out = Unpickler(file, load).load()
  for key in Unpickler(file).load():
    (numel,), storage = struct.unpack("<q", file.read(8)), storages[key]
    check(numel == storage.size, "a storage of two sizes")
    storage[:] = np.frombuffer(file.read(storage.nbytes), storage.dtype)
  return out


def _load_from_bytes(data: bytes) -> Unpickled:
  file = io.BytesIO(data)
  check(Unpickler(file).load() == MAGIC, "a storage of another form")
  return legacy(file)


def dtype(name: str) -> np.dtype:
  """Returns the type of a name such as "bfloat16"."""
  check(name in STORAGES.values(), f"numbers of type {name}")
  return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def check(fine: bool, what: str) -> None:
  """Raises Refused unless all is fine."""
  if not fine:
    raise Refused(f"holds {what}")


class Unpickler(pickle.Unpickler):
  """Unpickles what is made of plain values and the stand-ins.

  `load` is (type, key, size) -> the storage [size] that a pickle refers to.
  """

  def __init__(self, file: IO[bytes], load: Callable | None = None):
    super().__init__(file)
    self._load = load

  def find_class(self, module: str, name: str) -> Unpickled:
    if (module, name) not in STAND_INS:
      raise Refused(
        f"holds {module}.{name}, which is no tensor: save its state dict, by "
        "torch.save(network.state_dict(), FILE)"
      )
    return STAND_INS[module, name]

  def persistent_load(self, pid: Unpickled) -> np.ndarray:
    check(self._load is not None and pid[0] == "storage", "an object by reference")
    _, kind, key, _, numel, *view = pid
    check(not any(view), "a view of a storage")
    return self._load(kind, key, numel)


class _Function:
  """Calls one of our functions; a pickle cannot change it."""

  __slots__ = ("_call",)

  def __init__(self, call: Callable):
    self._call = call

  def __call__(self, *args: Unpickled) -> Unpickled:
    return self._call(*args)

  def __setstate__(self, state: Unpickled) -> None:
    raise Refused("holds a function with a state")


class _Dict(dict):
  """A dict of another name; what else it was is dropped."""

  def __setstate__(self, state: Unpickled) -> None:
    pass


class Module:
  """A module, of which the state alone is kept."""

  def __new__(cls, *args: Unpickled) -> "Module":
    module = super().__new__(cls)
    module.state = {}
    return module

  def __setstate__(self, state: Unpickled) -> None:
    self.state = state


class _Dropped:
  """An object that no weight is in."""

  def __new__(cls, *args: Unpickled) -> "_Dropped":
    return super().__new__(cls)

  def __setstate__(self, state: Unpickled) -> None:
    pass


class Array:
  """An array of numpy's, of which the state is kept."""

  def __new__(cls, *args: Unpickled) -> "Array":
    array = super().__new__(cls)
    array.state = ()
    return array

  def __setstate__(self, state: Unpickled) -> None:
    self.state = state

  def read(self) -> np.ndarray:
    """Returns the array.

    Raises:
      Refused: it is of no numbers, or its bytes do not fit its shape.
    """
    check(isinstance(self.state, tuple) and len(self.state) == 5, "an array of nothing")
    _, shape, kind, by_columns, data = self.state
    check(isinstance(kind, _Dtype) and isinstance(data, bytes), "an array of objects")
    flat = np.frombuffer(data, dtype(NUMPY.get(kind.name, "")).newbyteorder(kind.order))
    return flat.reshape(shape, order="F" if by_columns else "C")


class _Dtype:
  """A type of numpy's, by its name and the order of its bytes."""

  def __new__(cls, name: str = "", *args: Unpickled) -> "_Dtype":
    kind = super().__new__(cls)
    kind.name, kind.order = name, "="
    return kind

  def __setstate__(self, state: Unpickled) -> None:
    self.order = state[1]


def _from_buffer(data: bytes, kind: Unpickled, shape: tuple, order: str) -> Array:
  array = Array()
  array.state = (1, shape, kind, order == "F", bytes(data))
  return array


def _persistent(meta: dict[str, Json]) -> Module:
  """Returns an object of EDM's, whose source code stands in meta beside its state."""
  module = Module()
  module.state = meta["state"]
  return module


def _tensor(
  storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Unpickled
) -> np.ndarray:
  """Returns a view of a storage, after checking that it stays inside."""
  check(isinstance(storage, np.ndarray) and storage.ndim == 1, "a tensor of nothing")
  check(len(size) == len(stride), "a tensor of two ranks")
  check(all(type(n) is int for n in (offset, *size, *stride)), "sizes that are none")
  check(min((offset, *size, *stride)) >= 0, "a tensor of negative size")
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  inside = math.prod(size) <= storage.size and last < storage.size
  check(inside or 0 in size, "a tensor larger than its storage")
  if 0 in size:
    return np.zeros(size, storage.dtype)
  strides = [s * storage.itemsize for s in stride]
  return np.lib.stride_tricks.as_strided(storage[offset:], size, strides)


def _encoded(text: str, encoding: str) -> bytes:
  check(encoding == "latin1", "text in a code")
  return text.encode("latin1")


def _first(x: Unpickled, *_: Unpickled) -> Unpickled:
  return x


STAND_INS: dict[tuple[str, str], Unpickled] = {
  ("collections", "OrderedDict"): _Dict,
  ("dnnlib.util", "EasyDict"): _Dict,
  ("dnnlib", "EasyDict"): _Dict,
  ("builtins", "set"): set,
  ("__builtin__", "set"): set,
  ("_codecs", "encode"): _Function(_encoded),
  ("torch", "Size"): tuple,
  ("torch", "device"): _Dropped,
  ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
  ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
  ("torch._utils", "_rebuild_parameter"): _Function(_first),
  ("torch._utils", "_rebuild_parameter_with_state"): _Function(_first),
  ("torch.storage", "_load_from_bytes"): _Function(_load_from_bytes),
  ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Function(_persistent),
  ("numpy", "ndarray"): _Dropped,
  ("numpy", "dtype"): _Dtype,
}
STAND_INS |= {("torch", f"{k}Storage"): v for k, v in STORAGES.items()}
STAND_INS |= {("torch", name): name for name in STORAGES.values()}
for _kind in ("ModuleDict", "ModuleList", "Sequential"):
  STAND_INS["torch.nn.modules.container", _kind] = Module
for _core in ("numpy.core", "numpy._core"):
  STAND_INS[f"{_core}.multiarray", "_reconstruct"] = Array
  STAND_INS[f"{_core}.multiarray", "scalar"] = _Dropped
  STAND_INS[f"{_core}.numeric", "_frombuffer"] = _Function(_from_buffer)
