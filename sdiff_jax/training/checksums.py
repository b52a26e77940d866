"""Checksums of the files of a checkpoint.

The format of checkpoints has checksums of its index, but none of the values of arrays: a
bit that flips on the disk would change a weight without a word.
"""

import os
import zlib

from sdiff_jax.io import file_io, records, storage
from sdiff_jax.types import UserError

NAME = "checksums.json"
BLOCK = 1 << 22  # bytes that are read at a time


def write(folder: str | os.PathLike[str]) -> None:
  """Writes checksums.json, file -> CRC-32 of its content.

  Of a bucket, which has computed them itself, they are CRC-32C.

  Args:
    folder: of a complete checkpoint.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write(folder)
    ...   os.listdir(folder) == [NAME]
    True
  """
  file_io.write_json(os.path.join(folder, NAME), _checksums(folder), indent=None)


def damaged(folder: str | os.PathLike[str], parts: tuple[str, ...]) -> str:
  """Returns the first file that is not as it was written, "" if there is none.

  Args:
    folder: of a checkpoint; without a checksums.json, which earlier versions did not
      write, nothing is known.
    parts: names of the subfolders whose files are checked.

  Example:
    >>> damaged("nothing/here", ("ema",))
    ''
  """
  path = os.path.join(folder, NAME)
  if not storage.lexists(path):
    return ""
  try:
    sums = records.read(path, dict[str, records.Count])
  except UserError:
    return NAME
  if storage.remote(folder):
    there = _checksums(folder)
    names = [n for n in sums if n.split("/")[0] in parts]
    return next((n for n in names if there.get(n) != sums[n]), "")
  for name, checksum in sums.items():
    if name.split(os.sep)[0] not in parts:
      continue
    try:
      file_io.regular_size(os.path.join(folder, name))
      if _checksum(os.path.join(folder, name)) != checksum:
        return name
    except UserError:
      return name
  return ""


def _checksums(folder: str | os.PathLike[str]) -> dict[str, int]:
  """Returns the checksums of all files below a folder."""
  if storage.remote(folder):
    return storage.checksums(folder)
  names = sorted(
    os.path.relpath(os.path.join(directory, name), folder)
    for directory, _, files in os.walk(folder)
    for name in files
  )
  return {name: _checksum(os.path.join(folder, name)) for name in names}


def _checksum(path: str) -> int:
  """Returns the CRC-32 of a file."""
  checksum = 0
  with open(path, "rb") as file:
    while block := file.read(BLOCK):
      checksum = zlib.crc32(block, checksum)
  return checksum
