"""Tensors of other people's files, by name; no code that a file names is run.

Reads .npz, .safetensors, PyTorch's .pt (both of its formats) and the pickled networks
of EDM and EDM2. A pickle is a program: here its globals become the inert stand-ins of
`_STAND_INS`, and any other ends the reading.
"""

import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import IO, Any

import jax
import ml_dtypes
import numpy as np

from sdiff_jax.interfaces import Params, UserError

MAGIC = 0x1950A86A20F9469CFC6C  # first in PyTorch's format without zip
SHOWN = 6  # names of each kind in an error
TYPES = {  # of safetensors
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "I64": "int64",
  "I32": "int32",
  "I16": "int16",
  "I8": "int8",
  "U8": "uint8",
  "BOOL": "bool",
}
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


class Refused(Exception):
  """A file holds what no file of weights needs."""


def read(path: str) -> dict[str, np.ndarray]:
  """Returns the tensors of a file by name.

  Of a dict with an entry "ema", or "state_dict", that entry; of a module its
  parameters and buffers, named as in its state dict.

  Raises:
    UserError: the file is missing, damaged, or holds something else.
  """
  try:
    with open(path, "rb") as file:
      tensors = _state_dict(_read(path, file))
  except FileNotFoundError:
    raise UserError(f"config.convert.file={path!r}: no such file") from None
  except Refused as error:
    raise UserError(f"{path}: {error}; nothing of it was run") from None
  except Exception as error:  # whatever a file of another kind leads to
    reason = f"{type(error).__name__}: {error}"
    raise UserError(f"{path} is damaged, or no file of weights ({reason})") from error
  if not tensors:
    raise UserError(f"{path} holds no tensors by name: save a state dict")
  return tensors


def fitted(
  tensors: dict[str, np.ndarray], like: Params, name: Callable[[tuple[str, ...]], str]
) -> Params:
  """Returns the tensors as a tree like another, in the layout of JAX.

  Kernels change from [out, in, ...] to [..., in, out]; a convolution of side 1 may
  be a matrix.

  Args:
    tensors: by name, in PyTorch's layout.
    like: a nested dict of arrays or ShapeDtypeStructs.
    name: keys of a leaf of `like` -> name of its tensor.

  Raises:
    UserError: lists tensors that are missing, left over or of another shape.
  """
  names = jax.tree.map_with_path(lambda path, _: name(tuple(k.key for k in path)), like)
  known = {*jax.tree.leaves(names)}
  found = {k: _transposed(v) for k, v in tensors.items()}
  missing = [k for k in known if k not in found]
  left = [k for k in found if k not in known]
  wrong = []

  def fit(name: str, leaf: Any) -> np.ndarray | None:
    x = found.get(name)
    if x is None:
      return None
    if x.shape == (1, 1, *leaf.shape):
      x = x[0, 0]
    if x.shape != leaf.shape:
      wrong.append(f"{name} {x.shape} for {leaf.shape}")
    return x.astype(leaf.dtype)

  fits = jax.tree.map(fit, names, like)
  problems = {"missing": missing, "left over": left, "of another shape": wrong}
  if any(problems.values()):
    listed = "; ".join(f"{k}: {_some(v)}" for k, v in problems.items() if v)
    raise UserError(f"the file does not fit config.model: {listed}")
  return fits


def _transposed(x: np.ndarray) -> np.ndarray:
  return x.transpose(*range(2, x.ndim), 1, 0) if x.ndim > 1 else x


def _some(names: list[str]) -> str:
  names = sorted(names)
  more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return ", ".join(names[:SHOWN]) + more


def _read(path: str, file: IO[bytes]) -> Any:
  """Returns what a file holds, by its form."""
  if zipfile.is_zipfile(file):
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
      for name in archive.namelist():
        if name.endswith("data.pkl"):
          return _torch_zip(archive, name.removesuffix("data.pkl"))
    with np.load(path) as arrays:
      return dict(arrays)
  file.seek(0)
  if path.endswith(".safetensors"):
    return _safetensors(file.read())
  first = _Unpickler(file).load()
  return _legacy(file) if isinstance(first, int) and first == MAGIC else first


def _safetensors(data: bytes) -> dict[str, np.ndarray]:
  (length,) = struct.unpack("<Q", data[:8])
  header, body = json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]
  out = {}
  for name, entry in header.items():
    if name != "__metadata__":
      begin, end = entry["data_offsets"]
      flat = np.frombuffer(body[begin:end], _dtype(TYPES[entry["dtype"]]))
      out[name] = flat.reshape(entry["shape"])
  return out


def _torch_zip(archive: zipfile.ZipFile, prefix: str) -> Any:
  """Returns the object of a .pt file, whose storages are files of a zip archive."""
  if f"{prefix}byteorder" in archive.namelist():
    _check(archive.read(f"{prefix}byteorder") == b"little", "bytes in another order")
  storages = {}

  def load(kind: str, key: str, numel: int) -> np.ndarray:
    if key not in storages:
      data = archive.read(f"{prefix}data/{key}")
      storages[key] = np.frombuffer(data, _dtype(kind), numel)
    return storages[key]

  return _Unpickler(io.BytesIO(archive.read(f"{prefix}data.pkl")), load).load()


def _legacy(file: IO[bytes]) -> Any:
  """Returns the object of a .pt file without zip, after its first number.

  Its storages come last, in the order of a list of their keys.
  """
  begin = file.tell()
  size = file.seek(0, io.SEEK_END) - begin
  file.seek(begin)
  storages = {}

  def load(kind: str, key: str, numel: int) -> np.ndarray:
    if key not in storages:
      dtype = _dtype(kind)
      _check(0 <= numel * dtype.itemsize <= size, "a storage larger than the file")
      storages[key] = np.zeros(numel, dtype)
    return storages[key]

  _check(_Unpickler(file).load() == 1001, "an unknown version of PyTorch's format")
  _check(_Unpickler(file).load()["little_endian"], "bytes in another order")
  out = _Unpickler(file, load).load()
  for key in _Unpickler(file).load():
    (numel,) = struct.unpack("<q", file.read(8))
    _check(numel == storages[key].size, "a storage of two sizes")
    storages[key][:] = np.frombuffer(
      file.read(storages[key].nbytes), storages[key].dtype
    )
  return out


def _load_from_bytes(data: bytes) -> Any:
  file = io.BytesIO(data)
  _check(_Unpickler(file).load() == MAGIC, "a storage of another form")
  return _legacy(file)


def _dtype(name: str) -> np.dtype:
  return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _check(fine: bool, what: str) -> None:
  if not fine:
    raise Refused(f"holds {what}")


class _Unpickler(pickle.Unpickler):
  """Unpickles what is made of plain values and the stand-ins."""

  def __init__(self, file: IO[bytes], load: Callable | None = None):
    super().__init__(file)
    self._load = load

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _STAND_INS:
      raise Refused(
        f"holds {module}.{name}, which is no tensor: save its state dict, by "
        "torch.save(network.state_dict(), FILE)"
      )
    return _STAND_INS[module, name]

  def persistent_load(self, pid: Any) -> np.ndarray:
    _check(self._load is not None and pid[0] == "storage", "an object by reference")
    _, kind, key, _, numel, *view = pid
    _check(not any(view), "a view of a storage")
    return self._load(kind, key, numel)


class _Function:
  """Calls one of our functions; a pickle cannot change it."""

  __slots__ = ("_call",)

  def __init__(self, call: Callable):
    self._call = call

  def __call__(self, *args: Any) -> Any:
    return self._call(*args)

  def __setstate__(self, state: Any) -> None:
    raise Refused("holds a function with a state")


class _Dict(dict):
  """A dict of another name; what else it was is dropped."""

  def __setstate__(self, state: Any) -> None:
    pass


class _Module:
  """A module, of which the state alone is kept."""

  def __new__(cls, *args: Any) -> "_Module":
    module = super().__new__(cls)
    module.state = {}
    return module

  def __setstate__(self, state: Any) -> None:
    self.state = state


class _Dropped:
  """An object that no weight is in."""

  def __new__(cls, *args: Any) -> "_Dropped":
    return super().__new__(cls)

  def __setstate__(self, state: Any) -> None:
    pass


def _persistent(meta: dict[str, Any]) -> _Module:
  """Returns an object of EDM's, whose source code stands in meta beside its state."""
  module = _Module()
  module.state = meta["state"]
  return module


def _tensor(
  storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any
) -> np.ndarray:
  """Returns a view of a storage, after checking that it stays inside."""
  _check(isinstance(storage, np.ndarray) and storage.ndim == 1, "a tensor of nothing")
  _check(len(size) == len(stride), "a tensor of two ranks")
  _check(min((offset, *size, *stride)) >= 0, "a tensor of negative size")
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  inside = math.prod(size) <= storage.size and last < storage.size
  _check(inside or 0 in size, "a tensor larger than its storage")
  if 0 in size:
    return np.zeros(size, storage.dtype)
  strides = [s * storage.itemsize for s in stride]
  return np.lib.stride_tricks.as_strided(storage[offset:], size, strides)


def _encoded(text: str, encoding: str) -> bytes:
  _check(encoding == "latin1", "text in a code")
  return text.encode("latin1")


def _first(x: Any, *_: Any) -> Any:
  return x


_STAND_INS: dict[tuple[str, str], Any] = {
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
  ("numpy", "dtype"): _Dropped,
}
_STAND_INS |= {("torch", f"{k}Storage"): v for k, v in STORAGES.items()}
_STAND_INS |= {("torch", name): name for name in STORAGES.values()}
for _kind in ("ModuleDict", "ModuleList", "Sequential"):
  _STAND_INS["torch.nn.modules.container", _kind] = _Module
for _core in ("numpy.core.multiarray", "numpy._core.multiarray"):
  _STAND_INS[_core, "_reconstruct"] = _STAND_INS[_core, "scalar"] = _Dropped


def _state_dict(found: Any) -> dict[str, np.ndarray]:
  """Returns the tensors of an object: a module's, or those of a dict."""
  for entry in ("ema", "state_dict"):
    if isinstance(found, dict) and entry in found:
      found = found[entry]
  if isinstance(found, _Module):
    return dict(_walk(found, "", set()))
  found = found if isinstance(found, dict) else {}
  return {k: v.copy() for k, v in found.items() if isinstance(v, np.ndarray)}


def _walk(module: _Module, prefix: str, above: set[int]):
  """Yields names and tensors of a module and those inside it."""
  _check(id(module) not in above, "a module inside itself")
  state = module.state
  dropped = state.get("_non_persistent_buffers_set", ())
  for kind in ("_parameters", "_buffers"):
    for name, x in state.get(kind, {}).items():
      if isinstance(x, np.ndarray) and name not in dropped:
        yield f"{prefix}{name}", x.copy()
  for name, inner in state.get("_modules", {}).items():
    if isinstance(inner, _Module):
      yield from _walk(inner, f"{prefix}{name}.", above | {id(module)})
