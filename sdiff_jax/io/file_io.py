"""Files that are written atomically, and JSON files that are read with a clear error.

A file that is written here is complete or absent: after a kill, or on a full disk, the
previous version is still there.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sdiff_jax.types import Json, UserError

Path = str | os.PathLike[str]


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[str]:
  """Yields a temporary path, which is renamed to `path` if the block succeeds.

  Args:
    path: the file; missing parent directories are created.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = f"{path}.tmp"
  yield temporary
  os.replace(temporary, path)


def write_bytes(path: Path, data: bytes) -> None:
  """Writes bytes to a file atomically."""
  with atomic(path) as temporary:
    pathlib.Path(temporary).write_bytes(data)


def write_text(path: Path, text: str) -> None:
  """Writes UTF-8 text to a file atomically."""
  write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Json, indent: int | None = 2) -> None:
  """Writes a value as JSON to a file atomically."""
  write_text(path, json.dumps(value, indent=indent))


def write_npz(path: Path, **arrays: npt.ArrayLike) -> None:
  """Writes arrays to an .npz file atomically."""
  with atomic(path) as temporary, open(temporary, "wb") as file:
    np.savez(file, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle


def read_json(path: Path, remedy: str = "") -> Json:
  """Returns the value of a JSON file.

  Args:
    path: the file.
    remedy: what to do if it is missing or damaged; the end of the message.

  Raises:
    UserError: the file is missing, or is not JSON in UTF-8; the message starts with
      the path.
  """
  end = f": {remedy}" if remedy else ""
  try:
    return json.loads(pathlib.Path(path).read_bytes())
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(f"{path} does not exist{end}") from None
  except ValueError as error:
    raise UserError(f"{path} is not valid JSON ({error}){end}") from error


def as_json(value: Json) -> Json:
  """Returns a value as it will be read back from JSON: tuples become lists."""
  return json.loads(json.dumps(value))
