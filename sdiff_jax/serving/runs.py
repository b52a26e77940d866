"""Runs while they train: losses, grids of samples, and the time that is left."""

import os
import pathlib
import time
from collections.abc import Sequence

from sdiff_jax.io import file_io, storage
from sdiff_jax.reports import loading
from sdiff_jax.training import metric_writer, summary
from sdiff_jax.types import Json, UserError

MAX_POINTS = 300  # of a curve
MAX_GRID = 1 << 24  # bytes
RECENT = 10  # lines whose speed gives the time that is left
# Not shown as curves.
OTHER = ("step", "seconds", "images_per_second", "learning_rate", "skipped")


def overview(folders: Sequence[str]) -> list[dict[str, Json]]:
  """Returns what is known of each run, in the order of the folders.

  Args:
    folders: work directories; those without a config.json are left out, as are files
      that cannot be read, which are named.
  """
  found = []
  for number, folder in enumerate(folders):
    if storage.lexists(os.path.join(folder, loading.CONFIG)):
      found.append({"run": number, **_run(storage.of(folder))})
  return found


def grid(folders: Sequence[str], run: int, index: int) -> bytes | None:
  """Returns a grid of samples of a run, a PNG; None if there is none.

  Args:
    folders: work directories.
    run: number of the run among them.
    index: number of the grid among those of the run.

  Example:
    >>> grid([], 0, 0) is None
    True
  """
  if not run < len(folders):
    return None
  paths = _grids(storage.of(folders[run]))
  if not index < len(paths):
    return None
  try:
    return file_io.read_bytes(paths[index], max_bytes=MAX_GRID)
  except UserError:
    return None


def time_left(lines: Sequence[dict[str, Json]], total: int) -> float | None:
  """Returns the seconds that training still takes, at the speed of the last lines.

  Args:
    lines: of metrics.jsonl.
    total: number of steps.

  Example:
    >>> time_left([{"step": 1, "seconds": 3.0}, {"step": 2, "seconds": 5.0}], 4)
    4.0
  """
  timed = [line for line in lines if line.get("seconds") is not None][-RECENT:]
  if len(timed) < 2 or timed[-1]["step"] <= timed[0]["step"]:
    return None
  steps = timed[-1]["step"] - timed[0]["step"]
  speed = (timed[-1]["seconds"] - timed[0]["seconds"]) / steps
  return max(total - timed[-1]["step"], 0) * max(speed, 0.0)


def _run(path: pathlib.Path) -> dict[str, Json]:
  """Returns what the page shows of a run."""
  faults = list[str]()
  config = loading.tolerant(faults, {}, loading.read_config, path / loading.CONFIG)
  lines = loading.tolerant(faults, [], metric_writer.read_metrics, path)
  cost = loading.tolerant(faults, None, summary.read, path)
  total = config.get("train", {}).get("steps", 0)
  step = lines[-1]["step"] if lines else 0
  names = dict.fromkeys(name for line in lines for name in line if name not in OTHER)
  return {
    "name": path.name,
    "kind": loading.title(config["loss"]) if config else "",
    "data": config["data"]["name"] if config else "",
    "step": step,
    "total": total,
    "finished": bool(cost and cost["steps"] >= total),
    "left": None if cost else time_left(lines, total),
    "age": _age(path / metric_writer.METRICS),
    "speed": lines[-1].get("images_per_second") if lines else None,
    "curves": {name: _curve(lines, name) for name in names},
    "grids": [p.stem for p in _grids(path)],
    "faults": faults,
  }


def _curve(lines: Sequence[dict[str, Json]], name: str) -> list[list[float]]:
  """Returns steps and values of a metric, at most MAX_POINTS of them."""
  points = [[line["step"], line[name]] for line in lines if line.get(name) is not None]
  stride = -(-len(points) // MAX_POINTS) or 1
  return points[::stride] + points[-1:] * (
    len(points) > 1 and len(points) % stride != 1
  )


def _grids(path: pathlib.Path) -> list[pathlib.Path]:
  return [*map(storage.of, storage.glob(path / "samples", "*_*.png"))]


def _age(path: pathlib.Path) -> float | None:
  """Returns the seconds since a file was written."""
  try:
    return max(time.time() - storage.modified(path), 0.0)
  except OSError:
    return None
