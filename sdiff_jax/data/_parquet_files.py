"""Columns of Parquet files, of which groups of rows are read and kept for a while."""

import collections
import concurrent.futures
import contextlib
import os
import stat
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from sdiff_jax.io import bounded, storage
from sdiff_jax.types import UserError

Arrow = Any  # pyarrow and its objects; it is an optional dependency
Value = Any  # of a column, or what is kept of one
ENDING = ".parquet"
MAX_CACHED = 2**30  # bytes of groups of rows that stay in memory
ROWS_AT_ONCE = 8  # that are decoded before their size is checked
MAX_FOOTER = 2**28  # bytes of a text in a footer, and entries of a list
FEATURES = b"huggingface"  # key of what the Hub's library says of the columns


class Group(NamedTuple):
  """A group of rows, which is read at once.

  Attributes:
    path: of its file.
    number: in the file.
    rows: number of rows.
  """

  path: str
  number: int
  rows: int


class Table:
  """The rows of some files, in the order of the files.

  Attributes:
    paths: of the files.
    kinds: column -> "image", "integer", "text" or "other".
    classes: column of integers -> number of its named classes, if the files name any.
    size: number of rows.
    rows: numbers of rows of the files.
  """

  def __init__(self, paths: Sequence[str]):
    """Reads the footers.

    Raises:
      UserError: a file is damaged, or has other columns than the first; or pyarrow is
        not installed.
    """
    self.paths = tuple(paths)
    footers = {path: _footer(path) for path in paths}
    schemas = [footer.schema.to_arrow_schema() for footer in footers.values()]
    for path, schema in zip(paths, schemas, strict=True):
      if schema.names != schemas[0].names or schema.types != schemas[0].types:
        raise UserError(f"{path}: has other columns than {paths[0]}; name one data set")
    self.kinds = {field.name: _kind(field.type) for field in schemas[0]}
    self.classes = _classes(schemas[0].metadata or {})
    self._leaves = {
      field.name: _leaf(field) for field in schemas[0] if _kind(field.type) == "image"
    }
    self._groups = [
      Group(path, k, footer.row_group(k).num_rows)
      for path, footer in footers.items()
      for k in range(footer.num_row_groups)
      if footer.row_group(k).num_rows
    ]
    self._ends = np.cumsum([group.rows for group in self._groups], dtype=np.int64)
    self.size = int(self._ends[-1]) if self._groups else 0
    self.rows = tuple(footer.num_rows for footer in footers.values())
    self._footers = footers
    self._stored = {path: storage.size(path) for path in paths}
    self._cache = _Cache(lambda key: self._read(*key), MAX_CACHED)

  def values(self, column: str, indices: np.ndarray) -> list[Value]:
    """Returns the values of a column in some rows; None for those without.

    Args:
      column: its name; of images the bytes are returned.
      indices: of the rows, int [n].

    Raises:
      UserError: a file is damaged.
    """
    groups = np.searchsorted(self._ends, indices, side="right")
    rows = indices - np.concatenate([[0], self._ends])[groups]
    out, last, values = [], -1, []
    for group, row in zip(groups.tolist(), rows.tolist(), strict=True):
      if group != last:
        last, values = group, self._cache[column, group]
      out.append(values[row])
    return out

  def where(self, index: int) -> str:
    """Returns file and row of a row, for messages."""
    path = self._groups[int(np.searchsorted(self._ends, index, side="right"))].path
    before = sum(self.rows[: self.paths.index(path)])
    return f"{path}: row {index - before}"

  def _read(self, column: str, number: int) -> tuple[list[Value], int]:
    """Returns the values of a column in a group of rows, and their size in bytes."""
    group, leaf = self._groups[number], self._leaves.get(column, column)
    footer = self._footers[group.path]
    values: list[Value] = []
    size = 0
    with _damage(group.path), _open(group.path, footer) as file:
      about, stored = footer.row_group(group.number), self._stored[group.path]
      leaves = [about.column(k) for k in range(about.num_columns)]
      claimed = [x.total_uncompressed_size for x in leaves if x.path_in_schema == leaf]
      bounded.check_expansion(sum(claimed), stored, column)
      batches = file.iter_batches(
        ROWS_AT_ONCE, row_groups=[group.number], columns=[leaf], use_threads=False
      )
      for batch in batches:
        size += batch.nbytes
        bounded.check_expansion(size, stored, column)
        values += batch.column(0).to_pylist()
      if len(values) != group.rows:
        raise ValueError(f"{len(values)} rows in place of {group.rows}")
    if leaf != column:  # a struct of the bytes alone
      values = [None if value is None else value["bytes"] for value in values]
    return values, size


class _Cache:
  """Values of a function, of which the latest are kept, for several threads."""

  def __init__(self, read: Callable[[Value], tuple[Value, int]], max_bytes: int):
    """Stores the function.

    Args:
      read: key -> value, and its size in bytes. It is called once for several threads
        that ask for one key.
      max_bytes: of all values that are kept.
    """
    self._read, self._max_bytes = read, max_bytes
    self._futures: collections.OrderedDict[Hashable, concurrent.futures.Future] = (
      collections.OrderedDict()
    )
    self._sizes: dict[Hashable, int] = {}
    self._lock = threading.Lock()

  def __getitem__(self, key: Hashable) -> Value:
    """Returns the value of a key."""
    with self._lock:
      future = self._futures.get(key)
      mine = future is None
      if future is None:
        future = self._futures[key] = concurrent.futures.Future()
      self._futures.move_to_end(key)
    if mine:
      try:
        value, size = self._read(key)
      except BaseException as error:
        with self._lock:
          del self._futures[key]
        future.set_exception(error)
        raise
      future.set_result(value)
      with self._lock:
        self._sizes[key] = size
        old = [k for k in self._futures if k in self._sizes and k != key]
        while old and sum(self._sizes.values()) > self._max_bytes:
          del self._futures[old[0]], self._sizes[old.pop(0)]
    return future.result()


def paths(folder: str, split: str) -> list[str]:
  """Returns the files of a split in a folder, sorted.

  Args:
    folder: of this machine or in a bucket.
    split: beginning of the names of the files, before "-" or the ending; "" for all.

  Raises:
    ValueError: there are none; the message starts with the argument `dir`.
  """
  if not storage.isdir(folder):
    raise ValueError(f"dir={folder!r}: is not a folder; name one of files {ENDING}")
  names = [name for name in sorted(storage.listdir(folder)) if name.endswith(ENDING)]
  if not names:
    raise ValueError(
      f"dir={folder!r}: no {ENDING} files; name the folder that has them"
    )
  found = [n for n in names if not split or n.startswith((f"{split}-", f"{split}."))]
  if not found:
    raise ValueError(
      f"dir={folder!r}: no files {split}-*{ENDING}; there is "
      f"{bounded.short(', '.join(names))}: name another split, '' for all"
    )
  return [os.path.join(folder, name) for name in found]


def _pyarrow() -> Arrow:
  """Returns the package, which is imported late since that is slow.

  Raises:
    UserError: it is not installed.
  """
  try:
    import pyarrow.parquet
  except ImportError:
    raise UserError(
      "Parquet files need the package pyarrow: pip install 'sdiff_jax[parquet]'"
    ) from None
  return pyarrow


@contextlib.contextmanager
def _open(path: str, footer: Arrow = None) -> Iterator[Arrow]:
  """Opens a file; an object is read in the ranges of bytes that are needed."""
  arrow = _pyarrow()
  options: dict[str, Any] = {
    "metadata": footer,
    "thrift_string_size_limit": MAX_FOOTER,
    "thrift_container_size_limit": MAX_FOOTER,
    "arrow_extensions_enabled": False,
  }
  with contextlib.ExitStack() as stack:
    source: Arrow = path
    if storage.remote(path):
      source = stack.enter_context(storage.open_ranges(path))
    else:
      status = os.stat(path)
      if stat.S_ISDIR(status.st_mode):
        raise ValueError("it is a folder")
      bounded.check_regular(path, status)
    yield stack.enter_context(arrow.parquet.ParquetFile(source, **options))


@contextlib.contextmanager
def _damage(path: str) -> Iterator[None]:
  """Names the file in what the package raises on damaged ones."""
  arrow = _pyarrow()
  try:
    yield
  except UserError:
    raise
  except (arrow.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
    reason = bounded.short(error) or type(error).__name__
    raise UserError(f"{path} is damaged ({reason}); download it again") from error


def _footer(path: str) -> Arrow:
  """Returns what the end of a file says of it."""
  with _damage(path), _open(path) as file:
    footer = file.metadata
    footer.schema.to_arrow_schema()  # which is refused here if it makes no sense
    return footer


def _kind(arrow_type: Arrow) -> str:
  types = _pyarrow().types
  if types.is_struct(arrow_type):
    fields = {field.name: field.type for field in arrow_type}
    return "image" if "bytes" in fields and _is_binary(fields["bytes"]) else "other"
  if _is_binary(arrow_type):
    return "image"
  if types.is_integer(arrow_type):
    return "integer"
  text = types.is_string(arrow_type) or types.is_large_string(arrow_type)
  return "text" if text else "other"


def _is_binary(arrow_type: Arrow) -> bool:
  types = _pyarrow().types
  return types.is_binary(arrow_type) or types.is_large_binary(arrow_type)


def _leaf(field: Arrow) -> str:
  """Returns the path of the bytes of a column of images."""
  return field.name if _is_binary(field.type) else f"{field.name}.bytes"


def _classes(metadata: dict[bytes, bytes]) -> dict[str, int]:
  """Returns column -> number of classes, as far as the Hub's library has named them."""
  try:
    about = msgspec.json.decode(metadata.get(FEATURES, b"{}"))
    features = about["info"]["features"]
    named = {name: feature.get("names") for name, feature in features.items()}
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return {}
  return {name: len(names) for name, names in named.items() if isinstance(names, list)}
