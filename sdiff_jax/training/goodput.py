"""What the seconds of a run were spent on, over all its starts: goodput.json."""

import contextlib
import os
import time
import types
from collections.abc import Iterator, Mapping

from sdiff_jax.io import file_io, records, storage
from sdiff_jax.io.records import Seconds
from sdiff_jax.types import Json

GOODPUT = "goodput.json"  # in a work directory
# In the order in which they are shown; "train" is the rest, and known at the end.
SPENT = ("start", "compile", "restore", "train", "sample", "evaluate", "save", "lost")
MEANINGS = {
  "start": "reading the config, the data and the teacher",
  "compile": "compiling the step",
  "restore": "reading checkpoints",
  "train": "steps",
  "sample": "grids of samples",
  "evaluate": "metrics of samples",
  "save": "steps waiting for checkpoints",
  "lost": "steps after the last checkpoint of a run that was killed",
}


class Goodput:
  """Adds up seconds by what they were spent on.

  Attributes:
    starts: number of starts of the run, with this one.
    seconds: that were spent so far, by names of SPENT.

  Example:
    >>> spent = Goodput()
    >>> with spent.on("compile"):
    ...   pass
    >>> spent.seconds["compile"] < 1
    True
  """

  def __init__(self, stored: Mapping[str, float] = types.MappingProxyType({})):
    """Continues what earlier starts of the run have spent (see `read`)."""
    self.starts = int(stored.get("starts", 0)) + 1
    self.seconds = {name: stored.get(name, 0.0) for name in SPENT}

  @contextlib.contextmanager
  def on(self, what: str) -> Iterator[None]:
    """Counts the seconds of a context."""
    begin = time.perf_counter()
    try:
      yield
    finally:
      self.seconds[what] += time.perf_counter() - begin

  def summary(self, training: float = 0.0) -> dict[str, float]:
    """Returns the seconds by what they were spent on, and the number of starts.

    Args:
      training: seconds of all steps, with those in which they waited for checkpoints.
    """
    steps = max(training - self.seconds["save"], 0.0)
    return {"starts": self.starts, **self.seconds, "train": steps}


def write(workdir: str, spent: Goodput) -> None:
  """Writes goodput.json, from which the next start of the run continues.

  Args:
    workdir: of the run.
    spent: by this start and the earlier ones.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write(folder, Goodput())
    ...   Goodput(read(folder)).starts
    2
  """
  file_io.write_json(os.path.join(workdir, GOODPUT), spent.summary())


def read(workdir: str) -> dict[str, float]:
  """Returns the content of goodput.json, {} if there is none.

  Args:
    workdir: of the run.

  Raises:
    UserError: the file is damaged.

  Example:
    >>> read("nothing/here")
    {}
  """
  path = os.path.join(workdir, GOODPUT)
  if not storage.lexists(path):
    return {}
  return records.read(path, dict[str, Seconds], "remove it")


def lost(lines: list[dict[str, Json]], start: int) -> float:
  """Returns the seconds of the steps that an earlier start made after its checkpoint.

  Args:
    lines: of metrics.jsonl, as the earlier start left them.
    start: step of the checkpoint.

  Example:
    >>> lost([{"step": 50, "seconds": 5.0}, {"step": 100, "seconds": 9.0}], 50)
    4.0
  """
  times = [(line["step"], line.get("seconds") or 0.0) for line in lines]
  before = [seconds for step, seconds in times if step <= start]
  return max((seconds for _, seconds in times), default=0.0) - max(before, default=0.0)
