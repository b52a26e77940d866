"""Traces of training steps, and their costliest operations.

JAX's profiler writes a trace for xprof, Perfetto and TensorBoard; `by_operation` sums it by
operation of the compiled program, without TensorFlow.
"""

import contextlib
import glob
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NotRequired, TypedDict

import jax

from sdiff_jax.io import file_io, records
from sdiff_jax.io.records import Count, Seconds

FOLDER = "profile"  # in a work directory
OPERATIONS = os.path.join(FOLDER, "operations.json")
MAX_SHOWN = 30  # operations
MAX_TRACE = 2**31  # bytes of a file; a trace is of a few steps


class Operation(TypedDict):
  """An operation of a compiled program.

  Attributes:
    name: in the program.
    seconds: in which it ran, on all devices, without the operations inside it.
    count: number of times that it ran.
  """

  name: str
  seconds: Seconds
  count: Count


class Operations(TypedDict):
  """Content of operations.json.

  Attributes:
    first: number of the first step of the trace, from 1.
    steps: number of steps.
    seconds: of all operations, those of the list and the others.
    operations: the costliest, in descending order.
    device: kind of the devices.
  """

  first: Count
  steps: Count
  seconds: Seconds
  operations: list[Operation]
  device: NotRequired[str]


class Span(NamedTuple):
  """An operation on one line of time.

  Attributes:
    name: of the operation.
    start: ns.
    duration: ns, with the operations inside it.
  """

  name: str
  start: float
  duration: float


class Profiler:
  """Traces some steps of a run, as a context manager.

  Example:
    >>> with Profiler("nowhere") as profiler:
    ...   profiler.before(1)
  """

  def __init__(self, workdir: str, first: int = 0, steps: int = 0):
    """Stores what is to be traced.

    Args:
      workdir: of the run; the trace is written into its folder `profile`.
      first: number of the first step of the trace, from 1; 0 for no trace.
      steps: number of steps of the trace.
    """
    self._workdir, self._first, self._steps = workdir, first, steps
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *exception: object) -> None:
    self._stack.close()

  def before(self, step: int, wait_for: object = None) -> None:
    """Starts or ends the trace, if this step is the first one or comes after the last.

    Args:
      step: number of the step that starts next, from 1.
      wait_for: arrays of the step before, which is waited for: it belongs to the trace as a
        whole, or not at all.
    """
    if not self._first:
      return
    if step in (self._first, self._first + self._steps):
      jax.block_until_ready(wait_for)
    if step == self._first:
      self._stack.enter_context(self._traced())
    elif step == self._first + self._steps:
      self._stack.close()

  @contextlib.contextmanager
  def _traced(self) -> Iterator[None]:
    """Traces, and writes files that may be in a bucket, which the profiler cannot."""
    with tempfile.TemporaryDirectory() as folder:
      jax.profiler.start_trace(folder)
      try:
        yield
      finally:
        jax.profiler.stop_trace()
      pattern = os.path.join(folder, "plugins", "profile", "*", "*")
      for path in sorted(glob.glob(pattern)):
        # The folders are those in which xprof and TensorBoard look for traces.
        target = os.path.join(self._workdir, FOLDER, os.path.relpath(path, folder))
        file_io.write_bytes(target, file_io.read_bytes(path, max_bytes=MAX_TRACE))
        if path.endswith(".xplane.pb"):
          found = summary(_operations(path), self._first, self._steps)
          file_io.write_json(os.path.join(self._workdir, OPERATIONS), found)


def _operations(path: str) -> list[Operation]:
  """Returns the operations of a trace *.xplane.pb, the costliest first."""
  return by_operation(_lines(jax.profiler.ProfileData.from_file(path)))


def summary(found: list[Operation], first: int, steps: int) -> Operations:
  """Returns what is written of the operations of a trace of some steps.

  Args:
    found: the operations, the costliest first.
    first: number of the first step, from 1.
    steps: number of steps.

  Example:
    >>> summary([{"name": "dot", "seconds": 2.0, "count": 3}], 100, 5)["seconds"]
    2.0
  """
  return {
    "first": first,
    "steps": steps,
    "seconds": math.fsum(operation["seconds"] for operation in found),
    "operations": found[:MAX_SHOWN],
    "device": jax.devices()[0].device_kind,
  }


def _lines(data: Any) -> Iterator[list[Span]]:
  """Yields the operations of each line of time of a trace."""
  for plane in data.planes:
    for line in plane.lines:
      on_tpu = plane.name.startswith("/device:TPU") and line.name == "XLA Ops"
      spans = [
        Span(event.name, event.start_ns, event.duration_ns)
        for event in line.events
        if on_tpu or any(name == "hlo_op" for name, _ in event.stats)
      ]
      if spans:
        yield spans


def by_operation(lines: Iterable[list[Span]]) -> list[Operation]:
  """Returns time and number of runs of each operation, the costliest first.

  The time of an operation is without that of the operations inside it, such as those of a
  loop's body.

  Args:
    lines: operations of each line of time.

  Example:
    >>> loop = [Span("while", 0, 10e9), Span("dot", 1e9, 3e9), Span("dot", 5e9, 3e9)]
    >>> [(x["name"], x["seconds"], x["count"]) for x in by_operation([loop])]
    [('dot', 6.0, 2), ('while', 4.0, 1)]
  """
  seconds: dict[str, float] = {}
  counts: dict[str, int] = {}
  for spans in lines:
    around: list[Span] = []  # the operations that run, from the outermost on
    for span in sorted(spans, key=lambda s: (s.start, -s.duration)):
      while around and around[-1].start + around[-1].duration <= span.start:
        around.pop()
      if around:
        seconds[around[-1].name] -= span.duration / 1e9
      seconds[span.name] = seconds.get(span.name, 0.0) + span.duration / 1e9
      counts[span.name] = counts.get(span.name, 0) + 1
      around.append(span)
  found: list[Operation] = [
    {"name": name, "seconds": max(value, 0.0), "count": counts[name]}
    for name, value in seconds.items()
  ]
  return sorted(found, key=lambda operation: -operation["seconds"])


def read(path: str | os.PathLike[str]) -> Operations:
  """Returns the costliest operations that a run has written.

  Args:
    path: of operations.json.

  Raises:
    UserError: the file is damaged.

  Example:
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = os.path.join(folder, "operations.json")
    ...   file_io.write_json(path, summary([], 1, 5))
    ...   read(path)["steps"]
    5
  """
  return records.read(path, Operations, "remove it, or trace again")
