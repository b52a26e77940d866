"""Compiled programs of one sampler at a ladder of batch sizes.

A batch is a dict of arrays whose leading axis is that of the samples. What row k of the
outputs is depends on row k of the inputs alone, so requests of many clients may share a
batch, and the rows that fill it up are copies.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np

Rows = dict[str, np.ndarray]  # name -> values, leading axis [B]

NUM_TIMED = 5  # calls, whose median counts


@dataclasses.dataclass(frozen=True, eq=False)
class Lane:
  """One function of rows, compiled for several batch sizes.

  Attributes:
    name: for metrics and messages.
    programs: batch size B -> inputs [B, ...] -> outputs [B, ...].
    seconds: batch size -> time of a call.
  """

  name: str
  programs: Mapping[int, Callable[[Rows], Rows]]
  seconds: Mapping[int, float]

  @property
  def sizes(self) -> list[int]:
    """The batch sizes, in increasing order."""
    return sorted(self.programs)

  def __call__(self, rows: Rows) -> Rows:
    """Returns the outputs of at most as many rows as the largest batch size."""
    count = num_rows(rows)
    size = fitting(self.sizes, count)
    outputs = self.programs[size](filled(rows, size))
    return {name: values[:count] for name, values in outputs.items()}


def timed(
  name: str, programs: Mapping[int, Callable[[Rows], Rows]], example: Rows
) -> Lane:
  """Returns a lane whose programs have been called and timed.

  Args:
    name: of the lane.
    programs: batch size -> inputs -> outputs.
    example: one row of inputs.

  Example:
    >>> double = lambda rows: {"y": 2 * rows["x"]}
    >>> lane = timed("double", {1: double, 4: double}, {"x": np.ones(1)})
    >>> lane({"x": np.arange(3)})["y"].tolist()
    [0, 2, 4]
  """
  seconds = {}
  for size, program in programs.items():
    rows, times = filled(example, size), []
    for _ in range(NUM_TIMED + 1):
      begin = time.perf_counter()
      program(rows)
      times.append(time.perf_counter() - begin)
    seconds[size] = statistics.median(times[1:])  # the first call warms up
  return Lane(name, programs, seconds)


def num_rows(rows: Rows) -> int:
  """Returns the number of rows, B.

  Args:
    rows: arrays [B, ...].

  Example:
    >>> num_rows({"x": np.ones((3, 2))})
    3
  """
  return len(next(iter(rows.values())))


def fitting(sizes: list[int], count: int) -> int:
  """Returns the smallest batch size that holds `count` rows.

  Args:
    sizes: batch sizes, in increasing order.
    count: number of rows.

  Raises:
    ValueError: there are more rows than the largest batch holds.

  Example:
    >>> fitting([1, 4, 16], 5)
    16
  """
  for size in sizes:
    if count <= size:
      return size
  raise ValueError(f"count={count}: must be at most {sizes[-1]}")


def best_size(seconds: Mapping[int, float], waiting: int) -> int:
  """Returns the batch size B that finishes the most rows a second.

  It maximizes min(waiting, B) / seconds(B). With 17 rows and sizes 16 and 64 that is 16
  where a batch of 64 takes four times as long, and 64 where it takes as long.

  Args:
    seconds: batch size -> time of a call.
    waiting: number of rows, at least 1.

  Example:
    >>> best_size({16: 1.0, 64: 4.0}, 17), best_size({16: 1.0, 64: 1.01}, 17)
    (16, 64)
  """
  return max(seconds, key=lambda size: (min(waiting, size) / seconds[size], -size))


def filled(rows: Rows, size: int) -> Rows:
  """Returns `size` rows: the given ones, then copies of the last one.

  Args:
    rows: arrays [B, ...] with 1 <= B <= size.
    size: number of rows.

  Example:
    >>> filled({"x": np.arange(2)}, 4)["x"].tolist()
    [0, 1, 1, 1]
  """
  missing = size - num_rows(rows)
  if not missing:
    return rows
  return {
    name: np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])
    for name, values in rows.items()
  }
