"""Tensors of other people's files, by name; no code that a file names is run.

Reads .npz, .safetensors, PyTorch's .pt (both of its formats) and the pickled networks
of EDM and EDM2 (see unpickle.py).
"""

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import jax
import numpy as np

from sdiff_jax.pretrained.files import safe_pickle
from sdiff_jax.types import Params, UserError

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
    raise UserError(f"{path}: no such file") from None
  except safe_pickle.Refused as error:
    raise UserError(f"{path}: {error}; nothing of it was run") from None
  except Exception as error:  # whatever a file of another kind leads to
    reason = f"{type(error).__name__}: {error}"
    raise UserError(f"{path} is damaged, or no file of weights ({reason})") from error
  if not tensors:
    raise UserError(f"{path} holds no tensors by name: save a state dict")
  return tensors


def match_params(
  tensors: dict[str, np.ndarray],
  like: Params,
  name: Callable[[tuple[str, ...]], str],
  network: str = "the network",
  path: str = "",
) -> Params:
  """Returns the tensors as a tree like another, in the layout of JAX.

  Kernels change from [out, in, ...] to [..., in, out]; a convolution of side 1 may
  be a matrix.

  Args:
    tensors: by name, in PyTorch's layout.
    like: a nested dict of arrays or ShapeDtypeStructs.
    name: keys of a leaf of `like` -> name of its tensor.
    network: what the message of an error calls the network.
    path: of the file, at the start of the message of an error.

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
    start = f"{path}: " if path else ""
    raise UserError(f"{start}the tensors do not fit {network}: {listed}")
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
  first = safe_pickle.Unpickler(file).load()
  is_legacy = isinstance(first, int) and first == safe_pickle.MAGIC
  return safe_pickle.legacy(file) if is_legacy else first


def _safetensors(data: bytes) -> dict[str, np.ndarray]:
  (length,) = struct.unpack("<Q", data[:8])
  header, body = json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]
  out = {}
  for name, entry in header.items():
    if name != "__metadata__":
      begin, end = entry["data_offsets"]
      flat = np.frombuffer(body[begin:end], safe_pickle.dtype(TYPES[entry["dtype"]]))
      out[name] = flat.reshape(entry["shape"])
  return out


def _torch_zip(archive: zipfile.ZipFile, prefix: str) -> Any:
  """Returns the object of a .pt file, whose storages are files of a zip archive."""
  if f"{prefix}byteorder" in archive.namelist():
    little = archive.read(f"{prefix}byteorder") == b"little"
    safe_pickle.check(little, "bytes in another order")
  storages = {}

  def load(kind: str, key: str, numel: int) -> np.ndarray:
    if key not in storages:
      data = archive.read(f"{prefix}data/{key}")
      storages[key] = np.frombuffer(data, safe_pickle.dtype(kind), numel)
    return storages[key]

  return safe_pickle.Unpickler(
    io.BytesIO(archive.read(f"{prefix}data.pkl")), load
  ).load()


def _state_dict(found: Any) -> dict[str, np.ndarray]:
  """Returns the tensors of an object: a module's, or those of a dict."""
  for entry in ("ema", "state_dict"):
    if isinstance(found, dict) and entry in found:
      found = found[entry]
  if isinstance(found, safe_pickle.Module):
    return dict(_walk(found, "", set()))
  found = found if isinstance(found, dict) else {}
  return {k: v.copy() for k, v in found.items() if isinstance(v, np.ndarray)}


def _walk(
  module: safe_pickle.Module, prefix: str, above: set[int]
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields names and tensors of a module and those inside it."""
  safe_pickle.check(id(module) not in above, "a module inside itself")
  state = module.state
  dropped = state.get("_non_persistent_buffers_set", ())
  for kind in ("_parameters", "_buffers"):
    for name, x in state.get(kind, {}).items():
      if isinstance(x, np.ndarray) and name not in dropped:
        yield f"{prefix}{name}", x.copy()
  for name, inner in state.get("_modules", {}).items():
    if isinstance(inner, safe_pickle.Module):
      yield from _walk(inner, f"{prefix}{name}.", above | {id(module)})
