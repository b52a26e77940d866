"""Tensors of files of pretrained weights, by name.

The formats are .npz, .safetensors, PyTorch's .pt (both versions) and the pickled networks
of EDM and EDM2. No code of a file is run (see safe_pickle.py).
"""

import io
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import jax
import numpy as np
import safetensors.numpy

from sdiff_jax.pretrained.files import safe_pickle
from sdiff_jax.types import Json, Params, UserError

MAX_NAMES = 6  # of each kind in the message of an error


def read(path: str) -> dict[str, np.ndarray]:
  """Returns the tensors of a file by name.

  Args:
    path: of the file. If it holds a dict with the entry "ema" or "state_dict", the
      tensors are those of the entry; if it holds a module, those of its state dict.

  Returns:
    name -> array, in the layout of the file.

  Raises:
    UserError: the file is missing or damaged, or holds something else.
  """
  try:
    with open(path, "rb") as file:
      tensors = _state_dict(_read(path, file))
  except FileNotFoundError:
    raise UserError(f"{path}: no such file") from None
  except safe_pickle.Refused as error:
    raise UserError(f"{path}: {error}; no code of the file was run") from None
  except Exception as error:  # whatever a file of another format leads to
    reason = f"{type(error).__name__}: {error}"
    raise UserError(f"{path}: is damaged, or no file of weights ({reason})") from error
  if not tensors:
    raise UserError(f"{path}: holds no tensors by name; save a state dict")
  return tensors


def match_params(
  tensors: dict[str, np.ndarray],
  like: Params,
  name: Callable[[tuple[str, ...]], str],
  network: str = "the network",
  path: str = "",
) -> Params:
  """Converts tensors in PyTorch's layout to a tree of parameters.

  Kernels [out, in, ...] become [..., in, out]. A 1x1 convolution may become a matrix.

  Args:
    tensors: by name, in PyTorch's layout.
    like: nested dict of arrays or ShapeDtypeStructs.
    name: (keys of a leaf of `like`) -> name of its tensor.
    network: what the message of an error calls the network.
    path: of the file, at the start of the message of an error.

  Raises:
    UserError: lists tensors that are missing, left over or of another shape.
  """
  names = jax.tree.map_with_path(lambda path, _: name(tuple(k.key for k in path)), like)
  expected = {*jax.tree.leaves(names)}
  transposed = {k: _transpose(v) for k, v in tensors.items()}
  missing = [k for k in expected if k not in transposed]
  left_over = [k for k in transposed if k not in expected]
  wrong_shape = []

  def fit(name: str, leaf: Any) -> np.ndarray | None:
    x = transposed.get(name)
    if x is None:
      return None
    if x.shape == (1, 1, *leaf.shape):
      x = x[0, 0]
    if x.shape != leaf.shape:
      wrong_shape.append(f"{name} {x.shape} for {leaf.shape}")
    return x.astype(leaf.dtype)

  params = jax.tree.map(fit, names, like)
  problems = {
    "missing": missing,
    "left over": left_over,
    "of another shape": wrong_shape,
  }
  if any(problems.values()):
    listed = "; ".join(f"{k}: {_abbreviate(v)}" for k, v in problems.items() if v)
    start = f"{path}: " if path else ""
    raise UserError(f"{start}the tensors do not fit {network}: {listed}")
  return params


def _transpose(x: np.ndarray) -> np.ndarray:
  return x.transpose(*range(2, x.ndim), 1, 0) if x.ndim > 1 else x


def _abbreviate(names: list[str]) -> str:
  names = sorted(names)
  more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
  return ", ".join(names[:MAX_NAMES]) + more


def _read(path: str, file: IO[bytes]) -> Json:
  """Returns the content of a file, according to its format."""
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
    return safetensors.numpy.load_file(path)
  first = safe_pickle.Unpickler(file).load()
  is_legacy = isinstance(first, int) and first == safe_pickle.MAGIC
  return safe_pickle.legacy(file) if is_legacy else first


def _torch_zip(archive: zipfile.ZipFile, prefix: str) -> Json:
  """Returns the object of a .pt file, whose storages are files of a zip archive."""
  if f"{prefix}byteorder" in archive.namelist():
    little = archive.read(f"{prefix}byteorder") == b"little"
    safe_pickle.check(little, "big-endian bytes")
  storages = {}

  def load(kind: str, key: str, numel: int) -> np.ndarray:
    if key not in storages:
      data = archive.read(f"{prefix}data/{key}")
      storages[key] = np.frombuffer(data, safe_pickle.dtype(kind), numel)
    return storages[key]

  return safe_pickle.Unpickler(
    io.BytesIO(archive.read(f"{prefix}data.pkl")), load
  ).load()


def _state_dict(content: Json) -> dict[str, np.ndarray]:
  """Returns the tensors of a module, or of a dict."""
  for entry in ("ema", "state_dict"):
    if isinstance(content, dict) and entry in content:
      content = content[entry]
  if isinstance(content, safe_pickle.Module):
    return dict(_walk(content, "", set()))
  content = content if isinstance(content, dict) else {}
  return {k: v.copy() for k, v in content.items() if isinstance(v, np.ndarray)}


def _walk(
  module: safe_pickle.Module, prefix: str, ancestors: set[int]
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields names and tensors of a module and of its submodules."""
  safe_pickle.check(id(module) not in ancestors, "a module inside itself")
  state = module.state
  not_saved = state.get("_non_persistent_buffers_set", ())
  for kind in ("_parameters", "_buffers"):
    for name, x in state.get(kind, {}).items():
      if isinstance(x, np.ndarray) and name not in not_saved:
        yield f"{prefix}{name}", x.copy()
  for name, inner in state.get("_modules", {}).items():
    if isinstance(inner, safe_pickle.Module):
      yield from _walk(inner, f"{prefix}{name}.", ancestors | {id(module)})
