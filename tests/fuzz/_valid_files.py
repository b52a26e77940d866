"""Valid files of all kinds, in memory, and what reads them."""

import functools
import io
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
Files = dict[str, bytes]


class Reader(NamedTuple):
  """Something that reads files.

  Attributes:
    files: returns the valid files.
    call: reads the files of a folder.
    share: number of inputs in relation to other readers; less for slow ones.
    names: files to damage; () for all.
  """

  files: Callable[[], Files]
  call: Callable[[str], Any]
  share: int = 4
  names: tuple[str, ...] = ()


class Canary:
  """An object whose pickle creates a file when it is loaded."""

  def __init__(self, module: str):
    self._module = module

  def __reduce__(self) -> tuple:
    command = f"touch {tempfile.gettempdir()}/canary"
    return (os.system if self._module == "os" else eval), (
      command if self._module == "os" else f"__import__('os').system({command!r})",
    )


def npz(compressed: bool = False, **arrays: Any) -> bytes:
  file = io.BytesIO()
  (np.savez_compressed if compressed else np.savez)(file, **arrays)
  return file.getvalue()


def npy(array: np.ndarray) -> bytes:
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def rng() -> np.random.Generator:
  return np.random.default_rng(0)


def images(n: int = 6, side: int = 8, channels: int = 3) -> np.ndarray:
  return rng().integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def picture(array: np.ndarray, form: str, **options: Any) -> bytes:
  file = io.BytesIO()
  Image.fromarray(array.squeeze()).save(file, form, **options)
  return file.getvalue()


@functools.cache
def stored(make: Callable[[str], None]) -> Files:
  """Returns the files that a function writes into a folder."""
  with tempfile.TemporaryDirectory() as folder:
    make(folder)
    root = pathlib.Path(folder)
    return {
      str(path.relative_to(root)): path.read_bytes()
      for path in sorted(root.rglob("*"))
      if path.is_file()
    }


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
  header, data = {}, b""
  for name, x in tensors.items():
    x = np.ascontiguousarray(x, np.float32)
    offsets = [len(data), len(data) + x.nbytes]
    header[name] = {"dtype": "F32", "shape": [*x.shape], "data_offsets": offsets}
    data += x.tobytes()
  text = json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + data


def fixture(*names: str) -> Callable[[], Files]:
  def files() -> Files:
    return {pathlib.Path(name).name: (FIXTURES / name).read_bytes() for name in names}

  return files


def tree(name: str, *without: str) -> Callable[[], Files]:
  def files() -> Files:
    root = FIXTURES / name
    return {
      str(path.relative_to(root)): path.read_bytes()
      for path in sorted(root.rglob("*"))
      if path.is_file() and not any(part in str(path) for part in without)
    }

  return files
