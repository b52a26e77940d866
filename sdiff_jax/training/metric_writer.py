"""Where metrics and sample images go: JSON lines, TensorBoard, a progress bar."""

import json
import math
import os
import pathlib
import sys
import time

import numpy as np
import tensorboardX
import tqdm

from sdiff_jax.io import file_io, image_io

METRICS = "metrics.jsonl"
PLAIN_SECONDS = 10.0  # between two progress lines when there is no terminal


class Writer:
  """Writes what a training run reports, as a context manager.

  A run that starts again at step `start` first drops what an earlier, killed run
  wrote after its last checkpoint, so that every step appears once. Values must be on
  the host already: the writer never waits for a device.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    total: int,
    start: int = 0,
    unit: str = "images",
    active: bool = True,
  ):
    """Notes where and what to write; files are opened on entering.

    Args:
      workdir: directory of the run, made if missing.
      total: steps of the whole run.
      start: steps that earlier runs finished and saved.
      unit: what the rate in the progress bar counts.
      active: False on all processes but the first of a pod: nothing is written.
    """
    self._workdir = pathlib.Path(workdir)
    self._total = total
    self._start = start
    self._unit = unit
    self._active = active

  def __enter__(self) -> "Writer":
    if not self._active:
      return self
    self._workdir.mkdir(parents=True, exist_ok=True)
    first = self._start + 1 if self._start else 0  # of the steps this run will write
    path = self._workdir / METRICS
    _keep_before(path, first)
    self._lines = path.open("a", encoding="utf-8", buffering=1)
    self._board = tensorboardX.SummaryWriter(
      str(self._workdir / "tensorboard"),
      purge_step=first,
      max_queue=0,  # no limit: a full disk ends its thread, and a full queue blocks
      filename_suffix=f".{self._start}",
    )
    self._bar = tqdm.tqdm(
      total=self._total,
      initial=self._start,
      disable=not sys.stderr.isatty(),
      dynamic_ncols=True,
      bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps"
      "{postfix}, {remaining} left",
    )
    self._began = None
    self._printed = -math.inf
    return self

  def __exit__(self, *exception) -> None:
    if self._active:
      self._bar.close()
      self._board.close()
      self._lines.close()

  def scalars(self, step: int, values: dict) -> None:
    """Appends one line {"step": step, name: number, ...}; NaN and inf become null."""
    if not self._active:
      return
    numbers = {name: _finite(value) for name, value in values.items()}
    self._lines.write(json.dumps({"step": int(step), **numbers}) + "\n")
    for name, number in numbers.items():
      if number is not None:
        self._board.add_scalar(name, number, step)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes uint8 [H, W, C] to samples/<name>_<step>.png and to TensorBoard."""
    if not self._active:
      return
    image_io.save_png(self._workdir / "samples" / f"{name}_{step:07d}.png", image)
    self._board.add_image(name, image, step, dataformats="HWC")

  def progress(self, step: int, *, images_per_second: float, loss: float) -> None:
    """Moves the bar to `step`; without a terminal, prints a line now and then."""
    if not self._active:
      return
    numbers = f"{images_per_second:,.0f} {self._unit}/s, loss {loss:.4g}"
    if not self._bar.disable:
      self._bar.set_postfix_str(numbers, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = time.monotonic()
    if self._began is None:
      self._began = (step, now)
    if now - self._printed < PLAIN_SECONDS and step < self._total:
      return
    self._printed = now
    steps, seconds = step - self._began[0], now - self._began[1]
    left = ""  # unknown at the first call
    if steps > 0:
      remaining = seconds / steps * (self._total - step)
      left = f", {tqdm.tqdm.format_interval(remaining)} left"
    # print and not logging: it shows whatever the verbosity of the logs.
    print(f"step {step}/{self._total}, {numbers}{left}", file=sys.stderr, flush=True)


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
  """Returns the lines of a run's metrics.jsonl, [] if it has none."""
  path = pathlib.Path(workdir) / METRICS
  rows = []
  for line in path.read_text("utf-8").splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue  # a killed run leaves half a line behind
  return rows


def _finite(value) -> float | None:
  """Returns a numpy, JAX or Python scalar as a float; None, JSON's null, if not
  finite."""
  number = float(value)
  return number if math.isfinite(number) else None


def _keep_before(path: pathlib.Path, first: int) -> None:
  """Drops, at one stroke, the lines of steps >= first and a truncated last line."""
  if not path.exists():
    return
  kept = [row for row in read_metrics(path.parent) if row["step"] < first]
  file_io.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
