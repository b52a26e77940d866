"""Writes metrics and sample images: JSON lines, TensorBoard, W&B, a progress bar."""

import contextlib
import json
import math
import os
import types
from collections.abc import Mapping
from typing import NotRequired, TypedDict

import numpy as np

from sdiff_jax.io import file_io, image_io, records, storage
from sdiff_jax.io.mirror import mirrored
from sdiff_jax.io.progress import Progress
from sdiff_jax.io.records import Count, Seconds
from sdiff_jax.training.wandb_board import WandbBoard
from sdiff_jax.types import Json

METRICS = "metrics.jsonl"

Path = str | os.PathLike[str]


class Writer:
  """Writes the metrics of a training run, as a context manager.

  A run that resumes at step `start` first removes the lines that an earlier, killed run
  wrote after its last checkpoint, so that every step appears once. Values must be on
  the host already; the writer never waits for a device.

  In a bucket metrics.jsonl and TensorBoard's files are written again every 30 s, by a
  thread, and at each checkpoint (`flush`).
  """

  def __init__(
    self,
    workdir: Path,
    *,
    total: int,
    start: int = 0,
    unit: str = "images",
    active: bool = True,
    wandb: str = "",
    config: Mapping[str, Json] = types.MappingProxyType({}),
  ):
    """Stores the options; files are opened on entering the context.

    Args:
      workdir: directory of the run, created if it does not exist.
      total: number of steps of the whole run.
      start: number of steps that earlier runs finished and saved.
      unit: what the throughput in the progress bar counts.
      active: whether anything is written; False on all but one of several processes.
      wandb: project on Weights & Biases; "" for none.
      config: fields of the run, for Weights & Biases.
    """
    self._workdir = os.fspath(workdir)
    self._total = total
    self._start = start
    self._unit = unit
    self._active = active
    self._project, self._config = wandb, config
    self._wandb: WandbBoard | None = None
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> "Writer":
    if not self._active:
      return self
    import tensorboardX  # slow to import

    storage.makedirs(self._workdir)
    folder, self._flush = self._stack.enter_context(mirrored(self._workdir))
    first = self._start + 1 if self._start else 0  # first step of this run
    path = os.path.join(folder, METRICS)
    _keep_before(self._workdir, path, first)
    # buffering=1: each line is written at once
    lines = open(path, "a", encoding="utf-8", buffering=1)
    self._lines = self._stack.enter_context(lines)
    self._board = tensorboardX.SummaryWriter(
      os.path.join(folder, "tensorboard"),
      purge_step=first,
      max_queue=0,  # No limit: a full disk ends the thread, and a full queue blocks.
      filename_suffix=f".{self._start}",
    )
    if self._project:
      self._wandb = WandbBoard(self._project, str(self._workdir), self._config)
    self._progress = Progress(self._total, label="step", initial=self._start)
    self._progress.__enter__()
    return self

  def __exit__(self, *exception: object) -> None:
    if self._active:
      self._progress.__exit__()
      if self._wandb is not None:
        self._wandb.close()
      self._board.close()
      self._stack.close()

  def scalars(self, step: int, values: Mapping[str, Json]) -> None:
    """Appends a line {"step": step, name: number, ...}; NaN and inf become null."""
    if not self._active:
      return
    numbers = {name: _finite(value) for name, value in values.items()}
    self._lines.write(json.dumps({"step": int(step), **numbers}) + "\n")
    finite = {name: x for name, x in numbers.items() if x is not None}
    for name, number in finite.items():
      self._board.add_scalar(name, number, step)
    if self._wandb is not None:
      self._wandb.scalars(int(step), finite)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes uint8 [H, W, C] to samples/<name>_<step>.png and to TensorBoard."""
    if not self._active:
      return
    path = os.path.join(self._workdir, "samples", f"{name}_{step:07d}.png")
    image_io.save_png(path, image)
    self._board.add_image(name, image, step, dataformats="HWC")
    if self._wandb is not None:
      self._wandb.image(step, name, image)

  def flush(self) -> None:
    """Starts an upload of what was written, and does not wait for it."""
    if self._active:
      self._flush()

  def progress(self, step: int, *, images_per_second: float, loss: float) -> None:
    """Shows the step and some numbers (see `io.progress.Progress.show`)."""
    if self._active:
      numbers = f"{images_per_second:,.0f} {self._unit}/s, loss {loss:.4g}"
      self._progress.show(step, numbers)


class Line(TypedDict):
  """A line of metrics.jsonl; its other entries are metrics, numbers or null.

  Attributes:
    step: number of completed steps.
    seconds: duration of training up to this step.
  """

  step: Count
  seconds: NotRequired[Seconds | None]


def read_metrics(workdir: Path) -> list[dict[str, Json]]:
  """Returns the lines of a run's metrics.jsonl, [] if it has none.

  An incomplete last line, which a run that was killed may leave, is left out.

  Args:
    workdir: of the run.

  Raises:
    UserError: the file is damaged elsewhere; the message names the line.

  Example:
    >>> read_metrics("nothing/here")
    []
  """
  path = os.path.join(workdir, METRICS)
  if not storage.lexists(path):
    return []
  remedy = "remove the line, or the file"
  lines = records.read_lines(path, dict[str, float | None], remedy)
  for number, line in enumerate(lines, 1):
    records.check(line, Line, f"{path}: line {number}", remedy)
  return lines


def _finite(value: Json) -> float | None:
  """Returns a NumPy, JAX or Python scalar as a float, or None if it is not finite."""
  number = float(value)
  return number if math.isfinite(number) else None


def _keep_before(workdir: str, path: str, first: int) -> None:
  """Writes, atomically, the complete lines of a run of steps < first to a file."""
  if not storage.lexists(os.path.join(workdir, METRICS)):
    return
  kept = [row for row in read_metrics(workdir) if row["step"] < first]
  file_io.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
