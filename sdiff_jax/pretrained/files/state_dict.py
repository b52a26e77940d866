"""Tensors of files of pretrained weights, by name.

The formats are .npz, .safetensors, PyTorch's .pt (both versions) and the pickled networks
of EDM and EDM2. No code of a file is run (see safe_pickle.py).
"""

import contextlib
import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import jax
import numpy as np

from sdiff_jax.distributed import sharding
from sdiff_jax.io import array_io, bounded, downloads
from sdiff_jax.pretrained.files import safe_pickle, safetensors_file
from sdiff_jax.pretrained.files.safe_pickle import Budget
from sdiff_jax.pretrained.files.safetensors_file import StoredTensor
from sdiff_jax.types import Json, Params, UserError

MAX_NAMES = 6  # of each kind in the message of an error
MAX_MODULES = 2**14  # in a pickled network
MAX_NAME = 1000  # characters
MAX_SETTING = 64  # numbers of one setting
NUMBERS = {bool, int, float, type(None)}  # types of settings
ENTRIES = ("ema", "model_ema", "state_dict", "model")  # of a checkpoint: the network
Tensor = np.ndarray | StoredTensor


def read(path: str) -> dict[str, np.ndarray]:
  """Returns the tensors of a file by name.

  Args:
    path: of the file. If it holds a dict with one of `ENTRIES`, the tensors are those of
      the entry; if it holds a module, those of its state dict.

  Returns:
    name -> array, in the layout of the file.

  Raises:
    UserError: the file is missing or damaged, or holds something else.
  """
  return read_with_settings(path)[0]


def read_with_settings(path: str) -> tuple[dict[str, np.ndarray], dict[str, Json]]:
  """Returns the tensors of a file by name, and the settings of its modules.

  A pickled module of EDM or EDM2 has its constants as attributes, such as
  "unet.label_balance", and a checkpoint of DiT's training what it was started with, such
  as "args.model"; other files have no settings.

  Args:
    path: see `read`.

  Returns:
    name -> array, and name -> number, list of numbers, or text.

  Raises:
    UserError: see `read`.
  """
  with _one_line(path), bounded.open_regular(path) as file:
    tensors, settings = _read(path, file, Budget(bounded.stored_size(file)))
  if not tensors:
    raise UserError(f"{path}: holds no tensors by name; save a state dict")
  return tensors, settings


def stored(path: str) -> Mapping[str, Tensor]:
  """Returns the tensors of a file by name; those of .safetensors are not read yet.

  Args:
    path: see `read`.

  Raises:
    UserError: see `read`.
  """
  if not path.endswith(".safetensors"):
    return read(path)
  path = downloads.local(path)
  with _one_line(path), bounded.open_regular(path) as file:
    tensors = safetensors_file.stored(file, path)
  if not tensors:
    raise UserError(f"{path}: holds no tensors by name; save a state dict")
  return tensors


@contextlib.contextmanager
def _one_line(path: str) -> Iterator[None]:
  """Turns what a file of another format leads to into a UserError."""
  try:
    yield
  except FileNotFoundError:
    raise UserError(f"{path}: no such file") from None
  except safe_pickle.Refused as error:
    reason = bounded.short(error)
    raise UserError(f"{path}: {reason}; no code of the file was run") from None
  except safetensors_file.Unsupported as error:
    raise UserError(f"{path}: {error}") from None
  except UserError:
    raise
  except Exception as error:
    reason = f"{type(error).__name__}: {bounded.short(error)}"
    raise UserError(f"{path}: is damaged, or no file of weights ({reason})") from error


def check_finite(tensors: dict[str, np.ndarray], path: str) -> None:
  """Checks that all tensors of a file are finite.

  Args:
    tensors: by name.
    path: of the file.

  Raises:
    UserError: lists those that are not.
  """
  bad = [
    k for k, x in tensors.items() if x.dtype.kind == "f" and not np.isfinite(x).all()
  ]
  if bad:
    raise UserError(f"{path}: tensors that are not finite: {_abbreviate(bad)}")


def setting(settings: dict[str, Json], attribute: str) -> Json:
  """Returns the value that an attribute has in all modules of a file.

  Args:
    settings: of `read_with_settings`.
    attribute: its name, such as "label_balance".

  Returns:
    The number, or a tuple of them; None if no module has it.

  Raises:
    UserError: modules differ in it.

  Example:
    >>> setting({"unet.label_balance": 0.3}, "label_balance")
    0.3
  """
  values = {
    tuple(value) if isinstance(value, list) else value
    for name, value in settings.items()
    if name.rpartition(".")[2] == attribute
  }
  if len(values) > 1:
    raise UserError(f"{attribute}: modules of the file differ in it: {sorted(values)}")
  return next(iter(values), None)


def match_params(
  tensors: Mapping[str, Tensor],
  like: Params,
  name: Callable[[tuple[str, ...]], str],
  network: str = "the network",
  path: str = "",
  finite: bool = True,
  shardings: Params = None,
) -> Params:
  """Converts tensors in PyTorch's layout to a tree of parameters.

  Kernels [out, in, ...] become [..., in, out]; leaves named "embedding" keep their
  layout. A 1x1 convolution may become a matrix. Names and shapes are compared first, and
  then one tensor after another is read, and put on the devices.

  Args:
    tensors: by name, in PyTorch's layout.
    like: nested dict of arrays or ShapeDtypeStructs.
    name: (keys of a leaf of `like`) -> name of its tensor.
    network: what the message of an error calls the network.
    path: of the file, at the start of the message of an error.
    finite: refuse tensors that are not finite.
    shardings: of the leaves; None for parameters on the host.

  Raises:
    UserError: lists tensors that are missing, left over, of another shape or type, or
      not finite.
  """
  leaves = jax.tree.leaves_with_path(like)
  keys = [tuple(k.key for k in where) for where, _ in leaves]
  names = [name(k) for k in keys]
  wrong_shape, wrong_type, not_finite = [], [], []
  for k, at, (_, leaf) in zip(keys, names, leaves, strict=True):
    if at not in tensors:
      continue
    shape, kind = _shape(tensors[at].shape, k), tensors[at].dtype.kind
    if leaf.shape not in (shape, shape[2:] if shape[:2] == (1, 1) else shape):
      wrong_shape.append(f"{at} {shape} for {leaf.shape}")
    elif kind == "c" or kind in "SU":
      wrong_type.append(f"{at} {tensors[at].dtype}")
  expected = {*names}
  problems = {
    "missing": [k for k in expected if k not in tensors],
    "left over": [k for k in tensors if k not in expected],
    "of another shape": wrong_shape,
    "of another type": wrong_type,
  }
  _check(problems, network, path)

  def fit(k: tuple[str, ...], at: str, leaf: Any) -> np.ndarray:
    x = tensors[at]
    if isinstance(x, StoredTensor):
      with _one_line(x.path):
        x = x.read()
    if k[-1] != "embedding" and x.ndim > 1:
      x = x.transpose(*range(2, x.ndim), 1, 0)
    with np.errstate(over="ignore"):  # infinity is reported below
      x = x.reshape(leaf.shape).astype(leaf.dtype)
    if finite and not np.isfinite(x).all():
      not_finite.append(at)
    return x

  places = jax.tree.leaves(shardings)
  found = []
  for i, (_, leaf) in enumerate(leaves):
    x = fit(keys[i], names[i], leaf)
    found.append(sharding.device_put_global(x, places[i]) if places else x)
  _check({"not finite": not_finite}, network, path)
  return jax.tree.unflatten(jax.tree.structure(like), found)


def _shape(shape: tuple[int, ...], keys: tuple[str, ...]) -> tuple[int, ...]:
  """Returns the shape that a tensor in PyTorch's layout has as a leaf of a tree."""
  if keys[-1] == "embedding" or len(shape) < 2:
    return shape
  return (*shape[2:], shape[1], shape[0])


def _check(problems: dict[str, list[str]], network: str, path: str) -> None:
  """Raises a UserError that lists the names of all kinds of problems."""
  kinds = {k: v for k, v in problems.items() if v}
  if kinds:
    length = 330 // len(kinds)
    listed = "; ".join(f"{k}: {_abbreviate(v, length)}" for k, v in kinds.items())
    start = f"{path}: " if path else ""
    raise UserError(f"{start}the tensors do not fit {network}: {listed}")


def _abbreviate(names: list[str], length: int = 360) -> str:
  """Returns the first few names in at most about `length` characters."""
  names = [bounded.short(name, 100) for name in sorted(names)]
  listed = names[:1]
  for name in names[1:MAX_NAMES]:
    if sum(map(len, listed)) + len(name) > length:
      break
    listed.append(name)
  more = f" and {len(names) - len(listed)} more" if len(names) > len(listed) else ""
  return ", ".join(listed) + more


def _read(
  path: str, file: IO[bytes], budget: Budget
) -> tuple[dict[str, np.ndarray], dict[str, Json]]:
  """Returns the tensors and settings of a file, according to its format."""
  if zipfile.is_zipfile(file):
    with array_io.open_zip(file) as archive:
      for name in archive.namelist():
        if name.endswith("data.pkl"):
          content = _torch_zip(archive, name.removesuffix("data.pkl"), budget)
          return _network(content, budget)
    return array_io.read_npz(path), {}
  file.seek(0)
  if file.read(2) == b"PK":
    raise zipfile.BadZipFile("the archive ends too early")
  file.seek(0)
  if path.endswith(".safetensors"):
    return safetensors_file.read(file), {}
  first = safe_pickle.Unpickler(file, budget=budget).load()
  is_legacy = type(first) is int and first == safe_pickle.MAGIC
  content = safe_pickle.legacy(file, budget) if is_legacy else first
  return _network(content, budget)


def _network(
  content: Json, budget: Budget
) -> tuple[dict[str, np.ndarray], dict[str, Json]]:
  """Returns the tensors and settings of the network in a pickle."""
  tensors = _state_dict(content, budget)  # bounds the number of modules
  return tensors, dict(_settings(_entry(content))) | _arguments(content)


def _torch_zip(archive: zipfile.ZipFile, prefix: str, budget: Budget) -> Json:
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

  content = io.BytesIO(archive.read(f"{prefix}data.pkl"))
  return safe_pickle.Unpickler(content, load, budget).load()


def _entry(content: Json) -> Json:
  """Returns the entry of a file's content that holds the network."""
  for entry in ENTRIES:
    if isinstance(content, dict) and entry in content:
      content = content[entry]
  return content


def _settings(module: Json, prefix: str = "") -> Iterator[tuple[str, Json]]:
  """Yields names and values of the numbers that modules have as attributes."""
  if not isinstance(module, safe_pickle.Module):
    return
  for name, value in module.state.items():
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) <= MAX_SETTING and {*map(type, values)} <= NUMBERS:
      yield f"{prefix}{name}", value
  for name, inner in module.state.get("_modules", {}).items():
    yield from _settings(inner, f"{prefix}{name}.")


def _arguments(content: Json) -> dict[str, Json]:
  """Returns the texts and numbers among the arguments that a training was started with."""
  args = content.get("args") if isinstance(content, dict) else None
  state = args.state if isinstance(args, safe_pickle.Module) else args
  return {
    f"args.{name}": value
    for name, value in (state.items() if isinstance(state, dict) else ())
    if type(value) in NUMBERS | {str}
  }


def _state_dict(content: Json, budget: Budget) -> dict[str, np.ndarray]:
  """Returns copies of the tensors of a module, or of a dict."""
  content = _entry(content)
  if isinstance(content, safe_pickle.Module):
    tensors = list(_walk(content, "", set(), [0]))
  else:
    content = content if isinstance(content, dict) else {}
    tensors = [(k, x) for k, x in content.items() if isinstance(x, np.ndarray)]
  copies = {}
  for name, x in tensors:
    safe_pickle.check(type(name) is str and len(name) <= MAX_NAME, "a tensor's name")
    budget.copy(x.nbytes)
    copies[name] = x.copy()
  return copies


def _walk(
  module: safe_pickle.Module, prefix: str, ancestors: set[int], count: list[int]
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields names and tensors of a module and of its submodules.

  Args:
    module: the module.
    prefix: of the names.
    ancestors: identities of the modules that contain this one.
    count: number of modules so far, which is increased.
  """
  count[0] += 1
  safe_pickle.check(count[0] <= MAX_MODULES, f"more than {MAX_MODULES} modules")
  safe_pickle.check(id(module) not in ancestors, "a module inside itself")
  safe_pickle.check(len(prefix) <= MAX_NAME, "names of modules that are too long")
  state = module.state
  safe_pickle.check(isinstance(state, dict), "a module without a state")
  not_saved = state.get("_non_persistent_buffers_set", set())
  safe_pickle.check(isinstance(not_saved, set), "a module of another form")
  for kind in ("_parameters", "_buffers"):
    for name, x in state.get(kind, {}).items():
      if isinstance(x, np.ndarray) and name not in not_saved:
        safe_pickle.check(type(name) is str, "a tensor without a name")
        yield f"{prefix}{name}", x
  for name, inner in state.get("_modules", {}).items():
    if isinstance(inner, safe_pickle.Module):
      safe_pickle.check(type(name) is str, "a module without a name")
      inside = f"{prefix}{name}."
      yield from _walk(inner, inside, ancestors | {id(module)}, count)
