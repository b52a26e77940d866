"""The inert objects that take the place of what pickles of weights name."""

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from sdiff_jax.io import bounded
from sdiff_jax.types import Json

Unpickled = Any  # what a pickle can hold

MAX_AXES = 32
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
KEYS = (str, int, float, bool, bytes, type(None))  # types of keys of dicts


class Refused(Exception):
  """A file has content that files of weights do not need."""


def dtype(name: str) -> np.dtype:
  """Returns the type of a name such as "bfloat16"."""
  check(name in STORAGES.values(), f"numbers of type {bounded.short(name, 40)}")
  return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def check(fine: bool, what: str) -> None:
  """Raises Refused unless `fine`."""
  if not fine:
    raise Refused(f"holds {what}")


def plain_keys(keys: list) -> list:
  """Returns keys after checking that their hashes cost nothing."""
  check(all(type(key) in KEYS for key in keys), "a key that is no text or number")
  return keys


def set_items(target: Unpickled, items: list) -> dict:
  """Adds keys and values, which alternate, to a dict."""
  check(type(target) in (dict, Dict), "items of no dict")
  check(len(items) % 2 == 0, "a key without a value")
  target.update(zip(plain_keys(items[::2]), items[1::2], strict=True))
  return target


class Function:
  """Calls one of our functions; a pickle cannot change it."""

  __slots__ = ("_call",)

  def __init__(self, call: Callable):
    self._call = call

  def __call__(self, *args: Unpickled) -> Unpickled:
    return self._call(*args)

  def __setstate__(self, state: Unpickled) -> None:
    raise Refused("holds a function with a state")


class Dict(dict):
  """A dict of another name; what else it was is dropped."""

  def __init__(self, pairs: Unpickled = ()):
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    check(isinstance(pairs, list | tuple), "a dict of something else than pairs")
    check(all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs), "no pairs")
    plain_keys([pair[0] for pair in pairs])
    super().__init__(pairs)

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
    data = bytes(data) if isinstance(data, bytearray) else data
    check(isinstance(kind, _Dtype) and isinstance(data, bytes), "an array of objects")
    check(type(kind.name) is str and kind.order in (*"=<>|",), "numbers of no type")
    check(isinstance(shape, tuple) and len(shape) <= MAX_AXES, "an array without shape")
    check(all(type(n) is int and 0 <= n < 2**48 for n in shape), "a negative shape")
    flat = np.frombuffer(data, dtype(NUMPY.get(kind.name, "")).newbyteorder(kind.order))
    return flat.reshape(shape, order="F" if by_columns else "C")


class _Dtype:
  """A type of numpy's, by its name and the order of its bytes."""

  def __new__(cls, name: str = "", *args: Unpickled) -> "_Dtype":
    kind = super().__new__(cls)
    kind.name, kind.order = name, "="
    return kind

  def __setstate__(self, state: Unpickled) -> None:
    check(isinstance(state, tuple) and len(state) > 1, "numbers of no type")
    self.order = state[1]


def _from_buffer(data: bytes, kind: Unpickled, shape: tuple, order: str) -> Array:
  check(isinstance(data, bytes | bytearray), "an array of nothing")
  array = Array()
  array.state = (1, shape, kind, order == "F", data)
  return array


def _persistent(meta: dict[str, Json]) -> Module:
  """Returns an object of EDM's, whose source code stands in meta beside its state."""
  check(isinstance(meta, dict) and "state" in meta, "a module without a state")
  module = Module()
  module.state = meta["state"]
  return module


def _tensor(
  storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Unpickled
) -> np.ndarray:
  """Returns a view of a storage, after checking that it stays inside."""
  check(isinstance(storage, np.ndarray) and storage.ndim == 1, "a tensor of nothing")
  check(isinstance(size, tuple) and isinstance(stride, tuple), "sizes that are none")
  check(len(size) == len(stride) <= MAX_AXES, "a tensor of two ranks")
  check(all(type(n) is int for n in (offset, *size, *stride)), "sizes that are none")
  check(min((offset, *size, *stride)) >= 0, "a tensor of negative size")
  check(max((offset, *size, *stride)) < 2**48, "a tensor larger than its storage")
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  inside = math.prod(size) <= storage.size and last < storage.size
  check(inside or 0 in size, "a tensor larger than its storage")
  if 0 in size:
    return np.zeros(size, storage.dtype)
  strides = [s * storage.itemsize for s in stride]
  return np.lib.stride_tricks.as_strided(storage[offset:], size, strides)


def _encoded(text: str, encoding: str) -> bytes:
  check(type(text) is str and encoding == "latin1", "text in a code")
  return text.encode("latin1")


def _size(numbers: Unpickled = ()) -> tuple:
  """Returns a torch.Size: a tuple of integers, whose hash is that of its elements."""
  check(isinstance(numbers, list | tuple), "a size of something else than integers")
  check(all(type(n) is int for n in numbers), "a size of something else than integers")
  return tuple(numbers)


def _set(elements: Unpickled = ()) -> set:
  check(isinstance(elements, list | tuple), "a set of another form")
  return set(plain_keys(list(elements)))


def _first(x: Unpickled, *_: Unpickled) -> Unpickled:
  return x


STATEFUL = (Dict, Module, _Dropped, Array, _Dtype)
CLASSES = frozenset(STATEFUL)
STAND_INS: dict[tuple[str, str], Unpickled] = {
  ("collections", "OrderedDict"): Dict,
  ("dnnlib.util", "EasyDict"): Dict,
  ("dnnlib", "EasyDict"): Dict,
  ("argparse", "Namespace"): Module,
  ("builtins", "set"): Function(_set),
  ("__builtin__", "set"): Function(_set),
  ("_codecs", "encode"): Function(_encoded),
  ("torch", "Size"): Function(_size),
  ("torch", "device"): _Dropped,
  ("torch._utils", "_rebuild_tensor"): Function(_tensor),
  ("torch._utils", "_rebuild_tensor_v2"): Function(_tensor),
  ("torch._utils", "_rebuild_parameter"): Function(_first),
  ("torch._utils", "_rebuild_parameter_with_state"): Function(_first),
  ("torch_utils.persistence", "_reconstruct_persistent_obj"): Function(_persistent),
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
  STAND_INS[f"{_core}.numeric", "_frombuffer"] = Function(_from_buffer)
