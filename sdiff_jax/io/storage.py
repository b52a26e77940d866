"""Paths: of this machine, or gs://BUCKET/NAME in Google Cloud Storage.

The functions are those of `os`, `os.path` and `shutil`, for both. A path of this machine
goes to them unchanged. A bucket has objects and no folders: a folder is there while an
object below it is, an object appears whole once it is written, and nothing is renamed or
appended to. Listings are never cached, since other processes write, too.
"""

import contextlib
import functools
import glob as glob_lib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from sdiff_jax.types import Json, UserError

if TYPE_CHECKING:
  from etils import epath

Path = str | os.PathLike[str]

BUCKET = "gs://"
URL = re.compile(r"([A-Za-z][\w+.-]*:/|://)")


def remote(path: Path) -> bool:
  """Returns whether a path lies in a bucket.

  Args:
    path: of a file or folder.

  Example:
    >>> remote("gs://bucket/run"), remote("runs/run")
    (True, False)
  """
  return os.fspath(path).startswith(BUCKET)


@functools.cache
def filesystem() -> Any:
  """Returns the `gcsfs` file system of all buckets; importing it takes a second.

  Raises:
    UserError: the package is not installed.
  """
  try:
    import fsspec
    import gcsfs  # noqa: F401  # fsspec finds it by itself, with a longer message
  except ImportError:
    raise UserError(
      "paths that start with gs:// need the package gcsfs: pip install 'sdiff_jax[gcs]'"
    ) from None
  # Of all its file systems, those of Orbax and JAX included.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  return fsspec.filesystem("gcs")


def of(path: Path) -> "pathlib.Path | epath.Path":
  """Returns a path as an object with names, parents and `/`.

  Args:
    path: of a file or folder.

  Example:
    >>> of("gs://bucket/run") / "config.json"
    PosixGPath('gs://bucket/run/config.json')
  """
  if not remote(path):
    return pathlib.Path(path)
  from etils import epath

  return epath.Path(path)


def absolute(path: str) -> str:
  """Returns `os.path.abspath`; of a URL, without slashes at its end.

  Args:
    path: of a file or folder.

  Example:
    >>> absolute("gs://bucket//run/")
    'gs://bucket/run'
  """
  if not remote(path):
    return os.path.abspath(path)
  names = path.removeprefix(BUCKET).split("/")
  return BUCKET + "/".join(filter(None, names))


def exists(path: Path) -> bool:
  """Returns whether there is a file, an object or a folder."""
  return filesystem().exists(_url(path)) if remote(path) else os.path.exists(path)


def lexists(path: Path) -> bool:
  """Returns `exists`; of this machine, also for links that lead nowhere."""
  return exists(path) if remote(path) else os.path.lexists(path)


def isdir(path: Path) -> bool:
  """Returns whether there is a folder."""
  return filesystem().isdir(_url(path)) if remote(path) else os.path.isdir(path)


def isfile(path: Path) -> bool:
  """Returns whether there is a file or an object."""
  return filesystem().isfile(_url(path)) if remote(path) else os.path.isfile(path)


def listdir(path: Path) -> list[str]:
  """Returns the names in a folder.

  Raises:
    FileNotFoundError: there is no such folder.
  """
  if not remote(path):
    return os.listdir(path)
  found = filesystem().ls(_url(path), detail=False)
  return [os.path.basename(name.rstrip("/")) for name in found]


def glob(folder: Path, pattern: str) -> list[str]:
  """Returns the paths in a folder that match a pattern of `glob`, sorted."""
  if not remote(folder):
    return sorted(glob_lib.glob(os.path.join(glob_lib.escape(folder), pattern)))
  pattern = os.path.join(glob_lib.escape(_url(folder)), pattern)
  return sorted(BUCKET + name for name in filesystem().glob(pattern))


def makedirs(path: Path) -> None:
  """Creates a folder with its parents; in a bucket there is nothing to create."""
  if not remote(path):
    os.makedirs(path, exist_ok=True)


def remove(path: Path) -> None:
  """Removes a file.

  Raises:
    FileNotFoundError: there is no such file.
  """
  filesystem().rm_file(_url(path)) if remote(path) else os.remove(path)


def rmtree(path: Path) -> None:
  """Removes a folder and all that is in it.

  Raises:
    FileNotFoundError: there is no such folder.
  """
  filesystem().rm(_url(path), recursive=True) if remote(path) else shutil.rmtree(path)


def size(path: Path) -> int:
  """Returns the number of bytes of a file.

  Raises:
    FileNotFoundError: there is no such file.
  """
  return (
    filesystem().info(_url(path))["size"] if remote(path) else os.stat(path).st_size
  )


def version(path: Path) -> tuple[int, int]:
  """Returns what changes when a file is written again.

  Args:
    path: of a file.

  Returns:
    Its size in bytes, and the time of its last change in ns; of an object, its generation.

  Raises:
    FileNotFoundError: there is no such file.
  """
  if remote(path):
    info = filesystem().info(_url(path))
    return info["size"], int(info.get("generation", 0))
  status = os.stat(path)
  return status.st_size, status.st_mtime_ns


def modified(path: Path) -> float:
  """Returns the time at which a file was written, in s since 1970.

  Raises:
    FileNotFoundError: there is no such file.
  """
  if not remote(path):
    return os.stat(path).st_mtime
  return filesystem().info(_url(path))["mtime"].timestamp()


def created(folder: str) -> float:
  """Returns a time by which folders are sorted, the oldest first, in s.

  Args:
    folder: that exists.

  Returns:
    Of this machine, the time of the last change of its status; of a bucket, of the oldest
    object that lies in it itself.
  """
  if not remote(folder):
    return os.lstat(folder).st_ctime
  found = filesystem().ls(_url(folder), detail=True)
  times = [info["mtime"].timestamp() for info in found if info.get("mtime")]
  return min(times, default=0.0)


def upload(source: str, path: Path) -> None:
  """Writes the content of a file of this machine to an object.

  Args:
    source: path of the file.
    path: of the object, which appears, or changes, when all of it is there.
  """
  filesystem().put_file(source, _url(path))


def download(path: Path, target: str) -> None:
  """Writes the content of an object to a file of this machine.

  Args:
    path: of the object.
    target: path of the file.

  Raises:
    FileNotFoundError: there is no such object.
  """
  filesystem().get_file(_url(path), target)


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
  """Opens a file for reading; an object is copied to a temporary file first.

  Args:
    path: of the file.

  Raises:
    FileNotFoundError: there is no such file.
  """
  if not remote(path):
    with open(path, "rb") as file:
      yield file
    return
  with tempfile.NamedTemporaryFile() as copy:
    download(path, copy.name)
    with open(copy.name, "rb") as file:
      yield file


@contextlib.contextmanager
def open_ranges(path: Path) -> Iterator[BinaryIO]:
  """Opens a file for reading; of an object each read requests the bytes that it needs.

  Args:
    path: of the file.

  Raises:
    FileNotFoundError: there is no such file.
  """
  if remote(path):
    with filesystem().open(_url(path), "rb", cache_type="none") as file:
      yield file
  else:
    with open(path, "rb") as file:
      yield file


def objects(path: Path) -> dict[str, dict[str, Json]]:
  """Returns what a bucket says of an object, or of all objects below a folder.

  Args:
    path: in a bucket.

  Returns:
    Path below `path`, "" for an object itself -> its "size" in bytes, "generation", ...
  """
  prefix = _url(path)
  found = filesystem().find(prefix, detail=True)
  return {name.removeprefix(prefix).lstrip("/"): info for name, info in found.items()}


def checksums(folder: Path) -> dict[str, int]:
  """Returns the CRC-32C that a bucket has of each object below a folder.

  Args:
    folder: in a bucket.

  Returns:
    Path below the folder -> CRC-32C of the content. Nothing is read again for them.
  """
  import base64

  return {
    name: int.from_bytes(base64.b64decode(info.get("crc32c", "")), "big")
    for name, info in objects(folder).items()
  }


def check_access(folder: str) -> None:
  """Checks that a bucket exists and can be written, by an object that is removed again.

  Args:
    folder: in a bucket.

  Raises:
    UserError: the package is missing, or the bucket refuses; the message is one line.
  """
  probe = _url(f"{absolute(folder)}/.access-{os.getpid()}")
  with one_line(folder):
    filesystem().pipe_file(probe, b"")
    filesystem().rm_file(probe)


@contextlib.contextmanager
def one_line(path: str) -> Iterator[None]:
  """Turns whatever the first access to a bucket raises into a UserError.

  Args:
    path: in the bucket; one of this machine changes nothing.

  Raises:
    UserError: of the network, of credentials, or of the bucket.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if not remote(path):
      raise
    reason = " ".join(str(error).split()) or type(error).__name__
    bucket = BUCKET + _url(path).split("/")[0]
    raise UserError(
      f"{path}: {bucket} cannot be used ({reason[:200]}); create it, or log in by gcloud "
      "auth application-default login"
    ) from error


def problem(path: str, schemes: tuple[str, ...] = ("gs",)) -> str:
  """Returns what a path must be instead, "" if it may be read here.

  Args:
    path: of a file or folder.
    schemes: of URLs that are read.

  Example:
    >>> problem("s3://bucket/run")
    'a path of this machine, or start with gs://'
    >>> problem("runs/a"), problem("gs://bucket/run")
    ('', '')
  """
  match = URL.match(path)
  if match is None or path.startswith(tuple(f"{scheme}://" for scheme in schemes)):
    return ""
  allowed = " or ".join(f"{scheme}://" for scheme in schemes)
  return "a path of this machine" + (f", or start with {allowed}" if allowed else "")


def _url(path: Path) -> str:
  """Returns BUCKET/NAME, as the file system calls an object."""
  return absolute(os.fspath(path)).removeprefix(BUCKET)
