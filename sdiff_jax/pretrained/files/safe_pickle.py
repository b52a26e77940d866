"""A restricted unpickler for files of PyTorch and of EDM, which runs no code of theirs.

A pickle is a program that may call any function. Here the globals that files of weights
need are replaced by the inert objects of stand_ins.py, and any other global is refused.
The program is also bounded in its length and in the bytes that it may copy, and what it
puts into dicts and sets must be a plain key: the hash of nested tuples may take for ever.

`torch.load(weights_only=True)` would need PyTorch, and refuses the pickled modules of
EDM and EDM2 and the pickled NumPy statistics of EDM2.
"""

import io
import pickle
import struct
from collections.abc import Callable
from typing import IO

import numpy as np

from sdiff_jax.io import bounded
from sdiff_jax.pretrained.files.stand_ins import (
  CLASSES,
  STAND_INS,
  STATEFUL,
  Array,
  Function,
  Module,
  Refused,
  Unpickled,
  check,
  dtype,
  plain_keys,
  set_items,
)

__all__ = [
  "Array",
  "Budget",
  "Module",
  "Refused",
  "Unpickler",
  "check",
  "dtype",
  "legacy",
]

MAGIC = 0x1950A86A20F9469CFC6C  # first in PyTorch's format without zip
MAX_READS = 2**20  # of an opcode or its argument
REFUSED_OPCODES = (
  *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.PERSID),
  *(pickle.FROZENSET, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)


class Budget:
  """Bounds on what the pickles of one file may do.

  Attributes:
    left_reads: number of reads that are left.
    left_bytes: number of bytes that may still be copied or allocated.
  """

  def __init__(self, stored: int):
    """Starts the budget of a file of `stored` bytes."""
    self.left_reads = MAX_READS
    self.left_bytes = 2**24 + 8 * stored

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
      return Function(self._load_from_bytes)
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
    known = isinstance(function, Function) or (
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
    set_items(self.stack[-1], [key, value])

  def _load_setitems(self) -> None:
    items = self._pop_mark_checked()
    set_items(self.stack[-1], items)

  def _load_dict(self) -> None:
    items = self._pop_mark_checked()
    self.append(set_items({}, items))

  def _load_additems(self) -> None:
    items = self._pop_mark_checked()
    check(type(self.stack[-1]) is set, "elements of no set")
    self.stack[-1].update(plain_keys(items))

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
