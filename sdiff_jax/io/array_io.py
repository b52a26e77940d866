"""Arrays in .npz and .npy files: no pickles, and no size that the file cannot hold.

`numpy.load` allocates what a header claims, and gives back whatever else an archive
contains. Here each array is checked first: its type is a plain one, and its bytes are
those of the file.
"""

import contextlib
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import IO, NamedTuple

import numpy as np

from sdiff_jax.io import bounded
from sdiff_jax.io.bounded import Path, TooLarge
from sdiff_jax.types import UserError

MAX_HEADER = 2**16  # bytes of the header of an array
MAX_DIRECTORY = 2**24  # bytes of the table of contents of an archive
MAX_EMPTY_AXIS = 2**24  # largest axis of an array without elements
MAGIC = b"\x93NUMPY"
KINDS = "biufcSUV"
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What damaged archives and arrays raise.
DAMAGED = (
  *(ValueError, OSError, EOFError, KeyError, TypeError, RuntimeError, MemoryError),
  *(OverflowError, AttributeError, zipfile.BadZipFile, zlib.error, struct.error),
)


class Header(NamedTuple):
  """What the header of an array says.

  Attributes:
    shape: of the array.
    dtype: of its elements.
    by_columns: whether the first axis changes fastest.
    offset: number of bytes of the header.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  by_columns: bool
  offset: int

  @property
  def nbytes(self) -> int:
    """Number of bytes of the elements."""
    return math.prod(self.shape) * self.dtype.itemsize


def read_npz(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
  """Returns arrays of an .npz file by name.

  Args:
    path: the file.
    names: which arrays to read, if they are there; None for all.

  Raises:
    UserError: the file does not exist, is damaged, or holds something else than arrays.
  """
  with _npz(path) as (archive, headers):
    return {
      name: _member(archive, name, header)
      for name, header in headers.items()
      if names is None or name in names
    }


def npz_headers(path: Path) -> dict[str, Header]:
  """Returns what an .npz file says of its arrays, without reading them.

  Raises:
    UserError: see `read_npz`.
  """
  with _npz(path) as (_, headers):
    return headers


def checksum(path: Path, name: str) -> int:
  """Returns the checksum that an .npz file holds of an array, without reading it.

  Raises:
    UserError: see `read_npz`; or there is no such array.
  """
  with _npz(path) as (archive, headers):
    if name not in headers:
      raise UserError(f"{path} has no {name}")
    return archive.getinfo(f"{name}.npy").CRC


def read_npy(path: Path) -> np.ndarray:
  """Returns the array of an .npy file.

  Raises:
    UserError: the file does not exist, is damaged, or holds something else.
  """
  with _errors(path, "is no .npy"), bounded.open_regular(path) as file:
    header = _header(file)
    size = bounded.stored_size(file) - header.offset
    if header.nbytes != size:
      raise TooLarge(
        f"the array {header.shape} is said to have {header.nbytes} bytes, and there are "
        f"{size}"
      )
    return _array(file.read, header)


@contextlib.contextmanager
def open_zip(file: IO[bytes]) -> Iterator[zipfile.ZipFile]:
  """Opens an archive after checking that what it claims fits into its file.

  Args:
    file: an open file.

  Raises:
    TooLarge: the archive claims more than it holds.
    ValueError: it has encrypted or repeated members, or another compression.
    zipfile.BadZipFile: it is damaged.
  """
  stored = bounded.stored_size(file)
  _check_directory(file, stored)
  with zipfile.ZipFile(file) as archive:
    members = archive.infolist()
    if len({member.filename for member in members}) < len(members):
      raise ValueError("two members have the same name")
    if any(m.flag_bits & 1 for m in members):
      raise ValueError("it is encrypted")
    if any(m.compress_type not in METHODS for m in members):
      raise ValueError("it is compressed by another method than deflate")
    bounded.check_inside(sum(m.compress_size for m in members), stored, "its members")
    for m in members:
      if m.compress_type == zipfile.ZIP_STORED:
        bounded.check_inside(m.file_size, m.compress_size, bounded.short(m.filename))
    bounded.check_expansion(sum(m.file_size for m in members), stored, "it")
    yield archive


def _check_directory(file: IO[bytes], stored: int) -> None:
  """Checks the size of an archive's table of contents, which `zipfile` reads whole."""
  file.seek(max(stored - 66_000, 0))
  tail = file.read(66_000)
  file.seek(0)
  size = 0
  for signature, offset, kind in ((b"PK\5\6", 12, "<L"), (b"PK\6\6", 40, "<Q")):
    start = tail.rfind(signature)
    if start >= 0 and len(tail) - start >= offset + 8:
      (claimed,) = struct.unpack_from(kind, tail, start + offset)
      size = max(size, claimed if claimed != 2**32 - 1 else 0)
  if size > MAX_DIRECTORY:
    raise TooLarge(f"its table of contents has {size} bytes")


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, Header]]]:
  """Yields the archive of an .npz file, and the header of each array by its name."""
  with _errors(path, "is no .npz"), bounded.open_regular(path) as file:
    if file.read(len(MAGIC)) == MAGIC:
      raise UserError(f"{path} is one bare array: save it by np.savez(path, images)")
    with open_zip(file) as archive:
      headers = {}
      for member in archive.infolist():
        name = member.filename
        if not name.endswith(".npy"):
          raise ValueError(f"it holds {bounded.short(name, 60)!r}, which is no array")
        with archive.open(member) as content:
          header = _header(content)
        if header.nbytes != member.file_size - header.offset:
          raise TooLarge(
            f"{bounded.short(name, 60)} {header.shape} is said to have {header.nbytes} "
            f"bytes, and there are {member.file_size - header.offset}"
          )
        headers[name.removesuffix(".npy")] = header
      yield archive, headers


@contextlib.contextmanager
def _errors(path: Path, form: str) -> Iterator[None]:
  """Turns what damaged files raise into a UserError that starts with the path."""
  try:
    yield
  except FileNotFoundError:
    raise UserError(f"{path} does not exist") from None
  except DAMAGED as error:
    reason = bounded.short(error) or type(error).__name__
    raise UserError(f"{path} {form}, or damaged ({reason})") from error


def _header(file: IO[bytes]) -> Header:
  """Reads the header of an array, and leaves the file at its elements.

  Raises:
    ValueError: the header is none, or the type of the elements is no plain one.
  """
  start = file.read(8)
  if start[: len(MAGIC)] != MAGIC:
    raise ValueError("a member is no array of NumPy")
  version = tuple(start[len(MAGIC) :])
  if version not in ((1, 0), (2, 0)):
    raise ValueError(f"version {version} of the format is not supported")
  count, kind = (2, "<H") if version == (1, 0) else (4, "<L")
  length = file.read(count)
  (size,) = struct.unpack(kind, length)
  if size > MAX_HEADER:
    raise TooLarge(f"the header of an array has {size} bytes")
  text = io.BytesIO(length + file.read(size))
  read = (
    np.lib.format.read_array_header_1_0
    if version == (1, 0)
    else np.lib.format.read_array_header_2_0
  )
  try:
    shape, by_columns, dtype = read(text)
  except Exception as error:  # those of Python's parser and tokenizer, too
    reason = bounded.short(error, 100) or type(error).__name__
    raise ValueError(f"the header of an array is damaged: {reason}") from error
  if dtype.hasobject:
    raise ValueError("Object arrays cannot be loaded: they hold pickles")
  if dtype.kind not in KINDS or dtype.names or dtype.subdtype:
    raise ValueError(f"arrays of {bounded.short(dtype, 60)} are not supported")
  if min(shape, default=0) < 0 or len(shape) > 32:
    raise ValueError(f"an array has the shape {bounded.short(shape, 60)}")
  if not math.prod(shape) and max(shape) > MAX_EMPTY_AXIS:
    raise TooLarge(f"an array without elements has the shape {shape}")
  return Header(shape, dtype, by_columns, 8 + count + size)


def _member(archive: zipfile.ZipFile, name: str, header: Header) -> np.ndarray:
  """Returns an array of an archive."""
  with archive.open(f"{name}.npy") as file:
    file.read(header.offset)
    array = _array(file.read, header)
    file.read(1)  # compares the checksum
  return array


def _array(read: Callable[[int], bytes], header: Header) -> np.ndarray:
  """Returns an array whose elements follow its header."""
  bounded.check_memory(header.nbytes)
  flat = np.empty(math.prod(header.shape), header.dtype)
  view = memoryview(flat.view(np.uint8)) if header.nbytes else memoryview(b"")
  position = 0
  while position < header.nbytes:
    part = read(min(bounded.CHUNK, header.nbytes - position))
    if not part:
      raise EOFError("an array ends too early")
    view[position : position + len(part)] = part
    position += len(part)
  return flat.reshape(header.shape, order="F" if header.by_columns else "C")
