"""A restricted unpickler for files of PyTorch and of EDM, which runs no code of theirs.

A pickle is a program that may call any function. Here the globals that files of weights
need are replaced by the inert objects of `STAND_INS`, and any other global is refused.
The program is also bounded in its length and in the bytes that it may copy, and what it
puts into dicts and sets must be a plain key: the hash of nested tuples may take for ever.

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

from sdiff_jax.io import bounded
from sdiff_jax.types import Json

Unpickled = Any  # what a pickle can hold

MAGIC = 0x1950A86A20F9469CFC6C  # first in PyTorch's format without zip
MAX_READS = 2**20  # of an opcode or its argument
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
REFUSED_OPCODES = (
  *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.PERSID),
  *(pickle.FROZENSET, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)
KEYS = (str, int, float, bool, bytes, type(None))  # types of keys of dicts


class Refused(Exception):
  """A file has content that files of weights do not need."""


class Budget:
  """Bounds on what the pickles of one file may do.

  Attributes:
    left_reads: number of reads that are left.
    left_bytes: number of bytes that may still be copied or allocated.
  """

  def __init__(self, stored: int):
    """Starts the budget of a file of `stored` bytes."""
    self.left_reads = MAX_READS
    self.left_bytes = 2**24 + 4 * stored

  def read(self) -> None:
    """Counts one read."""
    self.left_reads -= 1
    check(self.left_reads >= 0, f"a pickle of more than {MAX_READS} parts")

  def copy(self, size: int) -> None:
    """Counts `size` bytes that are copied."""
    self.left_bytes -= size
    check(self.left_bytes >= 0, "far more content than the file has bytes")


class _Reader:
  """A file that is read part by part, and never beyond its end."""

  def __init__(self, file: IO[bytes], budget: Budget):
    self._file, self._budget = file, budget
    position = file.tell()
    self._left = file.seek(0, io.SEEK_END) - position
    file.seek(position)

  def read(self, size: int) -> bytes:
    self._budget.read()
    if not 0 <= size <= self._left:
      raise EOFError(f"the pickle needs {size} bytes where {self._left} are left")
    self._left -= size
    return self._file.read(size)

  def readline(self) -> bytes:
    self._budget.read()
    line = self._file.readline()
    self._left -= len(line)
    if not line.endswith(b"\n"):
      raise EOFError("the pickle ends within a line")
    return line


def legacy(file: IO[bytes], budget: Budget, nested: bool = False) -> Unpickled:
  """Returns the object of a .pt file without zip archive, after its magic number.

  The storages follow the object, in the order of a list of their keys.

  Args:
    file: the file.
    budget: of the file.
    nested: whether the file is a storage inside another pickle.
  """
  begin = file.tell()
  size = file.seek(0, io.SEEK_END) - begin
  file.seek(begin)
  storages: dict[str, np.ndarray] = {}
  total = 0

  def load_storage(kind: str, key: str, numel: int) -> np.ndarray:
    nonlocal total
    if key not in storages:
      of = dtype(kind)
      check(0 <= numel <= size, "a storage larger than the file")
      total += numel * of.itemsize
      check(total <= size, "a storage larger than the file")
      storages[key] = np.zeros(numel, of)
    return storages[key]

  def part(load: Callable | None = None) -> Unpickled:
    return Unpickler(file, load, budget, nested).load()

  check(part() == 1001, "an unknown version of PyTorch's format")
  check(part()["little_endian"], "big-endian bytes")
  out = part(load_storage)
  for key in part():
    check(isinstance(key, str), "a storage without a name")
    (numel,), storage = struct.unpack("<q", file.read(8)), storages[key]
    check(numel == storage.size, "a storage of two sizes")
    data = file.read(storage.nbytes)
    budget.copy(len(data))
    storage[:] = np.frombuffer(data, storage.dtype)
  return out


def dtype(name: str) -> np.dtype:
  """Returns the type of a name such as "bfloat16"."""
  check(name in STORAGES.values(), f"numbers of type {bounded.short(name, 40)}")
  return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def check(fine: bool, what: str) -> None:
  """Raises Refused unless `fine`."""
  if not fine:
    raise Refused(f"holds {what}")


class Unpickler(pickle._Unpickler):
  """Unpickles what is made of plain values and the stand-ins.

  This is Python's unpickler and not that in C, which allocates a table as large as the
  largest number that a pickle uses as a name.
  """

  def __init__(
    self,
    file: IO[bytes],
    load: Callable | None = None,
    budget: Budget | None = None,
    nested: bool = False,
  ):
    """Prepares to read the pickle at the position of a file.

    Args:
      file: the file.
      load: (type, key, size) -> the storage [size] that the pickle refers to.
      budget: of the file; None for one that is new.
      nested: whether the pickle is inside another, so that it may hold no third.
    """
    self._budget = budget or Budget(bounded.stored_size(file))
    reader = _Reader(file, self._budget)
    super().__init__(reader)
    self._load_storage, self._nested = load, nested
    self._nested_storages: dict[bytes, Unpickled] = {}

  def find_class(self, module: str, name: str) -> Unpickled:
    """Returns the stand-in of a global."""
    if (module, name) == ("torch.storage", "_load_from_bytes"):
      return _Function(self._load_from_bytes)
    if (module, name) not in STAND_INS:
      raise Refused(
        f"holds {bounded.short(f'{module}.{name}', 80)}, which is no tensor: save its "
        "state dict, by torch.save(network.state_dict(), FILE)"
      )
    return STAND_INS[module, name]

  def persistent_load(self, pid: Unpickled) -> np.ndarray:
    """Returns the storage that a reference names."""
    check(self._load_storage is not None, "an object by reference")
    check(type(pid) is tuple and len(pid) > 4 and pid[0] == "storage", "a reference")
    _, kind, key, _, numel, *view = pid
    check(not any(view), "a view of a storage")
    check(type(kind) is str and type(key) is str, "a reference to no storage")
    check(type(numel) is int, "a storage without a size")
    return self._load_storage(kind, key, numel)

  def _load_from_bytes(self, data: bytes) -> Unpickled:
    """Returns a storage that was pickled as a file of its own."""
    check(type(data) is bytes and not self._nested, "a storage of another form")
    if data not in self._nested_storages:
      self._budget.copy(len(data))
      file = io.BytesIO(data)
      first = Unpickler(file, None, self._budget, nested=True).load()
      check(type(first) is int and first == MAGIC, "a storage of another form")
      self._nested_storages[data] = legacy(file, self._budget, nested=True)
    return self._nested_storages[data]

  def _pop_mark_checked(self) -> list:
    items = self.pop_mark()
    self._budget.copy(8 * len(items))
    return items

  def _call(self, function: Unpickled, args: Unpickled) -> None:
    """Pushes function(*args), if it is a stand-in."""
    known = isinstance(function, _Function) or (
      isinstance(function, type) and function in CLASSES
    )
    check(known and type(args) is tuple, "a call of something else than a tensor")
    for x in args:
      if isinstance(x, bytes | bytearray | str):
        self._budget.copy(len(x))
      elif isinstance(x, list | tuple | dict | set):
        self._budget.copy(16 * len(x))
    self.append(function(*args))

  def _load_frame(self) -> None:
    self.read(8)  # of the size of a frame, which helps only those who read ahead

  def _load_reduce(self) -> None:
    args = self.stack.pop()
    self._call(self.stack.pop(), args)

  def _load_newobj_ex(self) -> None:
    check(self.stack.pop() == {}, "an object with named arguments")
    self._load_reduce()

  def _load_build(self) -> None:
    state = self.stack.pop()
    check(type(self.stack[-1]) in STATEFUL, "an object with a state")
    self.stack[-1].__setstate__(state)

  def _load_setitem(self) -> None:
    value, key = self.stack.pop(), self.stack.pop()
    _set_items(self.stack[-1], [key, value])

  def _load_setitems(self) -> None:
    items = self._pop_mark_checked()
    _set_items(self.stack[-1], items)

  def _load_dict(self) -> None:
    items = self._pop_mark_checked()
    self.append(_set_items({}, items))

  def _load_additems(self) -> None:
    items = self._pop_mark_checked()
    check(type(self.stack[-1]) is set, "elements of no set")
    self.stack[-1].update(_plain(items))

  def _load_bytearray(self) -> None:
    (size,) = struct.unpack("<Q", self.read(8))
    self.append(bytearray(self.read(size)))

  def _refuse(self) -> None:
    raise Refused("holds an instruction that no file of weights needs")


Unpickler.dispatch = pickle._Unpickler.dispatch | {
  pickle.FRAME[0]: Unpickler._load_frame,
  pickle.REDUCE[0]: Unpickler._load_reduce,
  pickle.NEWOBJ[0]: Unpickler._load_reduce,
  pickle.NEWOBJ_EX[0]: Unpickler._load_newobj_ex,
  pickle.BUILD[0]: Unpickler._load_build,
  pickle.SETITEM[0]: Unpickler._load_setitem,
  pickle.SETITEMS[0]: Unpickler._load_setitems,
  pickle.DICT[0]: Unpickler._load_dict,
  pickle.ADDITEMS[0]: Unpickler._load_additems,
  pickle.BYTEARRAY8[0]: Unpickler._load_bytearray,
  **dict.fromkeys((code[0] for code in REFUSED_OPCODES), Unpickler._refuse),
}


def _plain(keys: list) -> list:
  """Returns keys after checking that their hashes cost nothing."""
  check(all(type(key) in KEYS for key in keys), "a key that is no text or number")
  return keys


def _set_items(target: Unpickled, items: list) -> dict:
  """Adds keys and values, which alternate, to a dict."""
  check(type(target) in (dict, _Dict), "items of no dict")
  check(len(items) % 2 == 0, "a key without a value")
  target.update(zip(_plain(items[::2]), items[1::2], strict=True))
  return target


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

  def __init__(self, pairs: Unpickled = ()):
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    check(isinstance(pairs, list | tuple), "a dict of something else than pairs")
    check(all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs), "no pairs")
    _plain([pair[0] for pair in pairs])
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
  return set(_plain(list(elements)))


def _first(x: Unpickled, *_: Unpickled) -> Unpickled:
  return x


STATEFUL = (_Dict, Module, _Dropped, Array, _Dtype)
CLASSES = frozenset(STATEFUL)
STAND_INS: dict[tuple[str, str], Unpickled] = {
  ("collections", "OrderedDict"): _Dict,
  ("dnnlib.util", "EasyDict"): _Dict,
  ("dnnlib", "EasyDict"): _Dict,
  ("builtins", "set"): _Function(_set),
  ("__builtin__", "set"): _Function(_set),
  ("_codecs", "encode"): _Function(_encoded),
  ("torch", "Size"): _Function(_size),
  ("torch", "device"): _Dropped,
  ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
  ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
  ("torch._utils", "_rebuild_parameter"): _Function(_first),
  ("torch._utils", "_rebuild_parameter_with_state"): _Function(_first),
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
