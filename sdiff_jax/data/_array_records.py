"""Files of ArrayRecord whose records have one length: they are written whole, and read."""

import os
from collections.abc import Callable, Iterable

from sdiff_jax.io import bounded, file_io, storage
from sdiff_jax.types import UserError

WRITER_OPTIONS = "group_size:1,uncompressed"  # of array_record
MAX_FILES = 10**6
AGAIN = "encode it again"  # the end of messages


def paths(folder: str, name: str, size: int, shard_size: int) -> list[str]:
  """Returns the files of `size` records, of which each has `shard_size`."""
  count = -(-size // shard_size)
  if count > MAX_FILES:
    raise UserError(f"{folder}: claims {count} files of records")
  names = (f"{name}-{k:05d}-of-{count:05d}.array_record" for k in range(count))
  return [os.path.join(folder, name) for name in names]


def write(path: str, records: Iterable[bytes]) -> None:
  """Writes a file of records, whole or not at all.

  Raises:
    UserError: the file could not be written.
  """
  from array_record.python import array_record_module

  if not storage.isdir(os.path.dirname(path)):  # which `atomic` would create
    raise UserError(f"{path} was not written: its folder does not exist")
  try:
    with file_io.atomic(path) as temporary:
      writer = array_record_module.ArrayRecordWriter(temporary, WRITER_OPTIONS)
      for record in records:
        writer.write(record)
      writer.close()
  except RuntimeError as error:  # a full disk, for one
    reason = " ".join(str(error).split())
    raise UserError(f"{path} was not written: {reason[:200]}") from error


def reader(
  folder: str, files: list[str], size: int, width: int
) -> Callable[[list[int]], list[bytes]]:
  """Returns (indices) -> records of all files.

  Args:
    folder: of the files, for messages.
    files: in order.
    size: number of all records.
    width: bytes of a record, at least.

  Raises:
    UserError: a file is missing or damaged, or there are more or fewer records.
  """
  from array_record.python import array_record_data_source  # slow

  missing = [path for path in files if not storage.exists(path)]
  if missing:
    raise UserError(
      f"{missing[0]} is missing, and {len(missing) - 1} more: --job=encode has not "
      "finished; repeat the command to resume it"
    )
  stored = 0
  try:
    for path in files:
      if storage.remote(path):  # a copy of which would take long
        stored += storage.size(path)
        continue
      with bounded.open_regular(path) as file:
        stored += bounded.stored_size(file)
    needed = size * width
    if needed > bounded.MIN_EXPANDED + bounded.MAX_EXPANSION * stored:
      raise ValueError(f"{needed} bytes of latents in {stored} bytes of records")
    source = array_record_data_source.ArrayRecordDataSource(files)
  except (RuntimeError, ValueError, OSError) as error:
    reason = bounded.short(error)
    raise UserError(f"{folder} cannot be read: {reason}; {AGAIN}") from error
  if len(source) != size:
    raise UserError(f"{folder} has {len(source)} latents, not {size}")
  return source.__getitems__
