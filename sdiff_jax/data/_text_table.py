"""Captions as tokens, or as text encoders encoded them; the first is empty.

Each different caption is stored once. A record is its arrays in the order of their names,
int32 of tokens and float16 of what encoders made of them. A sample of the
data has the number of its caption.
"""

import math
from collections.abc import Mapping

import numpy as np

from sdiff_jax.data import _array_records
from sdiff_jax.diffusion import guidance
from sdiff_jax.types import CondSpec

FLOAT, TOKEN = np.dtype("<f2"), np.dtype("<i4")
INFINITE = np.uint16(0x7C00)  # exponent of infinity and NaN
EMPTY = 0  # number of the empty caption
MAX_CACHED = 2**28  # bytes of a table that is kept in memory

Shapes = Mapping[str, tuple[int, ...]]  # condition -> shape of one caption's


def paths(folder: str, size: int, shard_size: int) -> list[str]:
  """Returns the files of a table of `size` captions."""
  return _array_records.paths(folder, "texts", size, shard_size)


def write(path: str, texts: Mapping[str, np.ndarray]) -> None:
  """Writes captions to a file: name -> floats, or int of tokens, [n, ...].

  Raises:
    UserError: the file could not be written.
  """
  integers = all(np.issubdtype(x.dtype, np.integer) for x in texts.values())
  dtype = TOKEN if integers else FLOAT
  columns = [texts[name].astype(dtype) for name in sorted(texts)]
  rows = zip(*columns, strict=True)
  _array_records.write(path, (b"".join(x.tobytes() for x in row) for row in rows))


class TextTable:
  """The captions of a data set.

  Attributes:
    shapes: condition -> shape.
    size: number of captions.
    dtype: of the values, FLOAT or TOKEN.
    empty: condition -> values of the empty caption.
  """

  def __init__(
    self,
    folder: str,
    shapes: Shapes,
    size: int,
    shard_size: int,
    dtype: np.dtype = FLOAT,
  ):
    """Opens the files of a folder.

    Raises:
      UserError: a file is missing or damaged.
    """
    self.shapes, self.size = {k: tuple(shapes[k]) for k in sorted(shapes)}, size
    self.dtype = dtype
    self.paths = paths(folder, size, shard_size)
    self._width = dtype.itemsize * sum(map(math.prod, self.shapes.values()))
    self._read = _array_records.reader(folder, self.paths, size, self._width)
    self._whole: np.ndarray | None = None
    if size * self._width <= MAX_CACHED:
      self._whole = self._rows(np.arange(size))
    self.empty = {
      k: v[0] for k, v in self._split(self._rows(np.array([EMPTY]))).items()
    }

  def __getitem__(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Returns condition -> values [n, ...] of captions, and the empty one's.

    Raises:
      ValueError: there is no such caption, or a record is damaged.
    """
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.size:
      raise ValueError(f"a sample has caption {numbers.max()} of {self.size}")
    rows = self._rows(numbers) if self._whole is None else self._whole[numbers]
    texts = self._split(rows)
    empty = {
      guidance.empty_name(k): np.broadcast_to(self.empty[k][None], v.shape)
      for k, v in texts.items()
    }
    return texts | empty

  def specs(self) -> dict[str, CondSpec]:
    """Returns what the conditions are."""
    specs = {name: CondSpec(shape, self.dtype) for name, shape in self.shapes.items()}
    return specs | {guidance.empty_name(k): spec for k, spec in specs.items()}

  def _rows(self, numbers: np.ndarray) -> np.ndarray:
    """Returns records, [n, numbers of all conditions]."""
    stored = self._read(numbers.tolist())
    if any(len(record) != self._width for record in stored):
      raise ValueError(f"a caption has not the {self._width} bytes of its shapes")
    data = b"".join(stored)
    rows = np.frombuffer(data, self.dtype).reshape(len(stored), -1)
    if self.dtype == TOKEN:
      if (rows < 0).any():
        raise ValueError("a caption has a negative token")
      return rows
    bits = rows.view("<u2")  # much faster than isfinite of float16
    if ((bits & INFINITE) == INFINITE).any():
      raise ValueError("a caption is not finite")
    return rows

  def _split(self, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns condition -> values of records."""
    ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])[:-1]
    parts = np.split(rows, ends, axis=1)
    shapes = self.shapes.items()
    return {
      name: part.reshape(len(rows), *shape)
      for (name, shape), part in zip(shapes, parts, strict=True)
    }
