"""Bounds on what a file may claim, checked before memory is allocated for it.

A file says in its header how large its content is. Nothing here believes it: a size is
compared with the number of bytes that the file holds, multiplied by what compression can
plausibly achieve, and with the memory of the machine.
"""

import contextlib
import errno
import os
import stat
import zlib
from collections.abc import Iterator
from typing import IO, BinaryIO

from sdiff_jax.io import storage
from sdiff_jax.types import UserError

Path = str | os.PathLike[str]

# Deflate reaches 1032:1 on zeros, images and weights about 1:1 to 20:1. A file may expand
# by this factor, and small files to this many bytes.
MAX_EXPANSION = 32
MIN_EXPANDED = 2**28
MAX_QUOTED = 200  # characters of a file's content in a message
CHUNK = 2**24


class TooLarge(ValueError):
  """A file claims more than it can hold, or more than this machine can hold."""


def short(text: object, length: int = MAX_QUOTED) -> str:
  """Returns a text on one line, with an ellipsis if it is longer than `length`.

  Example:
    >>> short("a" * 300, 8)
    'aaaaa...'
  """
  line = " ".join(str(text).split())
  return line if len(line) <= length else line[: length - 3] + "..."


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
  """Opens a regular file for reading; a pipe, a device or a directory is refused.

  Args:
    path: the file.

  Raises:
    OSError: the file does not exist, or may not be read.
    UserError: the path is no regular file.
  """
  if storage.remote(path):
    with storage.open_file(path) as file:
      yield file
    return
  # Without O_NONBLOCK, opening a pipe would wait for a writer.
  descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
  try:
    check_regular(path, os.fstat(descriptor))
    file = os.fdopen(descriptor, "rb")
  except BaseException:
    os.close(descriptor)
    raise
  with file:
    yield file


def check_regular(path: Path, status: os.stat_result) -> None:
  """Raises a UserError unless the status is that of a regular file.

  A directory raises the OSError that opening it raises.
  """
  if stat.S_ISDIR(status.st_mode):
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
  if not stat.S_ISREG(status.st_mode):
    raise UserError(f"{path} is not a regular file; name a file, no pipe or device")


def read(path: Path, limit: int) -> bytes:
  """Returns the content of a regular file of at most `limit` bytes.

  Raises:
    OSError: the file does not exist, or may not be read.
    UserError: the path is no regular file.
    TooLarge: the file has more bytes.
  """
  with open_regular(path) as file:
    size = os.fstat(file.fileno()).st_size
    if size > limit:
      raise TooLarge(f"the file has {size} bytes, more than {limit}")
    return file.read(size)


def stored_size(file: IO[bytes]) -> int:
  """Returns the number of bytes of an open file, at most what its blocks can hold.

  The holes of a sparse file cost nothing on the disk, so its size is no bound.
  """
  try:
    status = os.fstat(file.fileno())
  except OSError:  # a file in memory
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(position)
    return size
  blocks = getattr(status, "st_blocks", None)
  if blocks is None:
    return status.st_size
  return min(status.st_size, MIN_EXPANDED + MAX_EXPANSION * 512 * blocks)


def check_expansion(expanded: int, stored: int, what: str = "its content") -> None:
  """Checks the size of decompressed data before they are decompressed.

  Args:
    expanded: number of bytes after decompression.
    stored: number of bytes in the file.
    what: the data, for the message.

  Raises:
    TooLarge: data that are worth reading do not compress so well.
  """
  if expanded > MIN_EXPANDED + MAX_EXPANSION * stored:
    raise TooLarge(
      f"{what} would expand from {stored} to {expanded} bytes; store it uncompressed"
    )
  check_memory(expanded, what)


def check_memory(size: int, what: str = "its content") -> None:
  """Raises TooLarge if `size` bytes are more than the memory of this machine."""
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if size > memory:
    raise TooLarge(
      f"{what} needs {size} bytes of memory, and this machine has {memory}"
    )


def check_inside(size: int, stored: int, what: str = "its content") -> None:
  """Raises TooLarge if a part of `size` bytes is claimed of a file of `stored` bytes."""
  if size > stored:
    raise TooLarge(f"{what} is said to have {size} bytes, and the file has {stored}")
  check_memory(size, what)


def inflate(data: bytes, limit: int, wbits: int = 31) -> bytes:
  """Returns decompressed data of at most `limit` bytes.

  Args:
    data: the compressed data.
    limit: largest number of bytes of the result.
    wbits: format, as in `zlib.decompress`: 31 for gzip, 15 for zlib.

  Raises:
    TooLarge: there are more bytes.
    zlib.error: the data are damaged.
    EOFError: the data are truncated.

  Example:
    >>> inflate(zlib.compress(b"abc"), 3, 15)
    b'abc'
  """
  parts, total = [], 0
  while data:
    stream = zlib.decompressobj(wbits)
    parts.append(stream.decompress(data, limit - total + 1))
    total += len(parts[-1])
    if total > limit:
      raise TooLarge(f"its content expands to more than {limit} bytes")
    if not stream.eof:
      raise EOFError("the compressed data end too early")
    data = stream.unused_data.lstrip(b"\0") if wbits == 31 else b""
  return b"".join(parts)


def read_gzip(path: Path) -> bytes:
  """Returns the content of a gzip file, whose size is bounded by that of the file.

  Raises:
    OSError: the file does not exist, or may not be read.
    UserError: the path is no regular file.
    TooLarge: the content is larger than `check_expansion` allows.
    EOFError, zlib.error: the file is damaged.
  """
  with open_regular(path) as file:
    size = stored_size(file)
    check_memory(size)
    return inflate(file.read(size), MIN_EXPANDED + MAX_EXPANSION * size)
