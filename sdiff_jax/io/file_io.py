"""Files that are written atomically, and JSON files that are read with a clear error.

A file that is written here is complete or absent: after a kill, or on a full disk, the
previous version is still there.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
import stat
import tempfile
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from sdiff_jax.io import storage
from sdiff_jax.types import Json, UserError

Path = str | os.PathLike[str]

MAX_BYTES = 16 << 20
TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
KINDS = {  # what is not a regular file -> how to recognize it
  "directory": stat.S_ISDIR,
  "named pipe": stat.S_ISFIFO,
  "device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
  "socket": stat.S_ISSOCK,
}


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[str]:
  """Yields a temporary path, which is renamed to `path` if the block succeeds.

  If it does not, the temporary file is removed, so that a full disk is not fuller. An
  object of a bucket is written to a temporary file of this machine, and then uploaded.

  Args:
    path: the file; missing parent directories are created.

  Raises:
    OSError: the file cannot be written.
  """
  if storage.remote(path):
    with tempfile.TemporaryDirectory() as folder:
      temporary = os.path.join(folder, "object")
      yield temporary
      storage.upload(temporary, path)
    return
  path = pathlib.Path(path)
  if path.is_dir():
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = f"{path}.tmp"
  try:
    _remove(temporary)  # of a process that was killed; it may be a link or a pipe
    yield temporary
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      _remove(temporary)
    raise


def _remove(path: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    os.unlink(path)


def write_bytes(path: Path, data: bytes) -> None:
  """Writes bytes to a file atomically."""
  with atomic(path) as temporary:
    pathlib.Path(temporary).write_bytes(data)


def write_text(path: Path, text: str) -> None:
  """Writes UTF-8 text to a file atomically."""
  write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Json, indent: int | None = 2) -> None:
  """Writes a value as JSON to a file atomically; NaN and infinity become null.

  Args:
    path: the file.
    value: of dicts, lists, tuples, strings, numbers, booleans and None.
    indent: spaces of each level; None writes one line.
  """
  write_text(path, json.dumps(without_nan(value), indent=indent, allow_nan=False))


def without_nan(value: Json) -> Json:
  """Returns a value of JSON with None instead of numbers that JSON does not have.

  Args:
    value: of dicts, lists, tuples, strings, numbers, booleans and None.

  Example:
    >>> without_nan({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
  """
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if isinstance(value, Mapping):
    return {key: without_nan(entry) for key, entry in value.items()}
  return [*map(without_nan, value)] if isinstance(value, list | tuple) else value


def write_npz(path: Path, **arrays: npt.ArrayLike) -> None:
  """Writes arrays to an .npz file atomically."""
  with atomic(path) as temporary, open(temporary, "wb") as file:
    np.savez(file, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle


def regular_size(path: Path, remedy: str = "") -> int:
  """Returns the size of a regular file in bytes, without opening it.

  Args:
    path: the file; a symbolic link to a regular file is one.
    remedy: the end of the message.

  Raises:
    UserError: there is no such file, or it is a directory, a pipe, a device or a socket;
      the message starts with the path.
  """
  end = f"; {remedy}" if remedy else ""
  if storage.remote(path):
    if not storage.isfile(path):
      raise UserError(f"{path} does not exist{end}")
    return storage.size(path)
  try:
    status = os.stat(path)
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(f"{path} does not exist{end}") from None
  except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{path}: {reason}{end}") from None
  for kind, is_kind in KINDS.items():
    if is_kind(status.st_mode):
      raise UserError(f"{path} is a {kind}, not a regular file{end}")
  return status.st_size


def read_bytes(path: Path, remedy: str = "", max_bytes: int = MAX_BYTES) -> bytes:
  """Returns the content of a regular file of bounded size.

  Args:
    path: the file.
    remedy: the end of the message.
    max_bytes: largest size of the file.

  Raises:
    UserError: there is no such file, it is not a regular file, it cannot be read, or it
      is larger; the message starts with the path.
  """
  end = f"; {remedy}" if remedy else ""
  size = regular_size(path, remedy)
  try:
    with storage.open_file(path) as file:
      content = file.read(max_bytes + 1) if size <= max_bytes else b""
  except OSError as error:
    if error.errno in TOO_MANY_FILES:
      raise
    raise UserError(f"{path}: {error.strerror}{end}") from None
  if max(size, len(content)) > max_bytes:
    raise UserError(
      f"{path} has {max(size, len(content)):,} bytes: at most {max_bytes:,} are read{end}"
    )
  return content


def read_text(path: Path, remedy: str = "", max_bytes: int = MAX_BYTES) -> str:
  """Returns the content of a regular UTF-8 file of bounded size; see `read_bytes`.

  Raises:
    UserError: as in `read_bytes`, or the file is not UTF-8.
  """
  try:
    return read_bytes(path, remedy, max_bytes).decode("utf-8")
  except UnicodeDecodeError as error:
    end = f"; {remedy}" if remedy else ""
    raise UserError(f"{path} is not text in UTF-8 (byte {error.start}){end}") from None


def as_json(value: Json) -> Json:
  """Returns a value as it will be read back from JSON: tuples become lists."""
  return json.loads(json.dumps(value))
