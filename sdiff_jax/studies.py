"""What a study measures, as points, a figure and a table."""

import io
from typing import Any, NamedTuple

import matplotlib
import ml_collections
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from sdiff_jax import config
from sdiff_jax.interfaces import UserError

NAMES = {  # of axes
  "compute": "training FLOPs / the teacher's",
  "evaluations": "evaluations an image",
  "frechet": "Frechet distance",
  "passes": "passes",
  "ratio": "Frechet distance / the teacher's",
  "seconds": "seconds an image",
}


# Word -> config files of the runs, by kind, and what all runs of a study change.
SETTINGS = {
  "": (
    "configs/fashion_{}.py",
    (
      "model.width=256",
      "train.sample_every=0",
      "evaluate.num=5000",
      "evaluate.baselines=False",
    ),
  ),
  "paper": ("configs/imagenet64_{}.py:S", ("evaluate.num=50_000",)),
  "tiny": (
    "configs/digits_{}.py",
    (
      "model.width=16",
      "model.depth=1",
      "train.steps=4",
      "train.sample_every=0",
      "checkpoint.every=2",
      "checkpoint.keep_every=2",
      "evaluate.num=64",
      "evaluate.batch_size=64",
      "evaluate.baselines=False",
    ),
  ),
}


def setting(given: str, file: str) -> tuple[str, tuple[str, ...]]:
  """Returns the entry of SETTINGS for the word behind a study's file.

  Raises:
    UserError: another word.
  """
  if given not in SETTINGS:
    known = ", ".join(word for word in SETTINGS if word)
    raise UserError(f"{file}:{given}: the words are {known}")
  return SETTINGS[given]


def run(
  file: str,
  *changes: str,
  teacher: str = "",
  weights: str = "",
  series: str = "",
  value: float | None = None,
  checkpoints: bool = False,
) -> dict[str, Any]:
  """Returns one run of a study.

  Args:
    file: config of the experiment, "configs/X.py" or "configs/X.py:words".
    *changes: "section.field=value" each; "loss=scm_discrete" takes another piece, which
      keeps the fields that both have.
    teacher: name of the run that it distils.
    weights: name of the run whose network is measured; "" trains one.
    series: what its points are called; "" for the run's name and the sampler.
    value: of its points on the axis "value".
    checkpoints: measure all checkpoints that were kept, not the last alone.
  """
  return {
    "config": file,
    "set": changes,
    "teacher": teacher,
    "weights": weights,
    "series": series,
    "value": value,
    "checkpoints": checkpoints,
  }


def build(
  name: str,
  runs: dict[str, dict[str, Any]],
  *,
  title: str,
  lead: str,
  x: str,
  panels: tuple[str, ...],
  log: str = "",
  source: str = "evaluate",
  seeds: tuple[int, ...] = (0, 1, 2),
  changes: tuple[str, ...] = (),
) -> ml_collections.ConfigDict:
  """Returns the config of a study.

  Args:
    name: of its files.
    runs: by name, see `run`; a teacher stands before its students.
    title: of the page.
    lead: what the study asks, a sentence or two.
    x: key of a point on the horizontal axis.
    panels: keys of a point on the vertical axes.
    log: the logarithmic axes, some of "xy".
    source: "evaluate" for rows of that job, "log" for lines of the training's log.
    seeds: each run is made with each.
    changes: fields that differ in all runs, see `run`.
  """
  c = config.base()
  c.job = "study"
  c.study = ml_collections.ConfigDict(
    {
      "name": name,
      "runs": tuple({"name": k} | v for k, v in runs.items()),
      "title": title,
      "lead": lead,
      "x": x,
      "panels": panels,
      "log": log,
      "source": source,
      "seeds": seeds,
      "set": changes,
    }
  )
  return c


class Curve(NamedTuple):
  """One series in one panel, over seeds; arrays [points]."""

  x: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  std: np.ndarray
  seeds: int


def curves(rows: list[dict[str, Any]], x: str, y: str) -> dict[str, Curve]:
  """Returns series -> curve.

  Args:
    rows: points {"series": ..., "seed": ..., x: number, y: number}; those without one
      of the numbers are left out. Points of one series at one x are its seeds.
    x: key of the horizontal axis.
    y: key of the vertical one.
  """
  found: dict[str, dict[float, list[float]]] = {}
  for row in rows:
    if row.get(x) is not None and row.get(y) is not None:
      # Shares of FLOPs of the same step may differ in their last digits.
      at = float(f"{row[x]:.4g}")
      found.setdefault(row["series"], {}).setdefault(at, []).append(row[y])
  out = {}
  for series, points in found.items():
    values = [np.array(points[at]) for at in sorted(points)]
    numbers = [[f(v) for v in values] for f in (np.mean, np.min, np.max, np.std)]
    mean, low, high, std = map(np.array, numbers)
    seeds = min(len(v) for v in values)
    out[series] = Curve(np.array(sorted(points)), mean, low, high, std, seeds)
  return out


def draw(
  rows: list[dict[str, Any]], x: str, panels: tuple[str, ...], log: str
) -> Figure:
  """Returns one panel for each key, with the mean and the range of every series.

  Args:
    rows: see `curves`.
    x: key of the horizontal axis.
    panels: keys of the vertical axes.
    log: the logarithmic axes, some of "xy".
  """
  size = (4.2 * len(panels) + 1.6, 3.4)
  figure = Figure(figsize=size, layout="constrained", facecolor="white")
  labels = {}
  all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axes, y in zip(all_axes, panels, strict=True):
    for k, (series, c) in enumerate(curves(rows, x, y).items()):
      colour = f"C{list(labels).index(series) if series in labels else k}"
      marker = "o" if len(c.x) < 30 else None
      (line,) = axes.plot(c.x, c.mean, color=colour, marker=marker, markersize=4)
      axes.fill_between(c.x, c.low, c.high, color=colour, alpha=0.2, linewidth=0)
      labels.setdefault(series, line)
    axes.set(xlabel=NAMES.get(x, x), ylabel=NAMES.get(y, y.replace("_", " ")))
    for name in set(log) & {"x", "y"}:
      getattr(axes, f"set_{name}scale")("log")
      axis = getattr(axes, f"{name}axis")
      low, high = axis.get_data_interval()
      axis.set_major_formatter(FormatStrFormatter("%g"))
      if high < 10 * low:  # else the powers of ten are enough
        axis.set_minor_formatter(FormatStrFormatter("%g"))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
  figure.legend(
    labels.values(), labels, loc="outside right center", frameon=False, fontsize=8
  )
  return figure


def table(
  rows: list[dict[str, Any]], x: str, panels: tuple[str, ...]
) -> list[list[str]]:
  """Returns lines of cells, the header first: series, x, and mean +- std over seeds."""
  lines = [["", NAMES.get(x, x), *(NAMES.get(y, y) for y in panels), "seeds"]]
  by_panel = [curves(rows, x, y) for y in panels]
  points = dict.fromkeys(
    (series, at) for found in by_panel for series, c in found.items() for at in c.x
  )
  for series, at in points:
    cells, seeds = [], 0
    for found in by_panel:
      c = found.get(series)
      if c is None or at not in c.x:
        cells.append("-")
        continue
      i, seeds = int(np.flatnonzero(c.x == at)[0]), c.seeds
      spread = f" ± {c.std[i]:.2g}" if seeds > 1 else ""
      cells.append(f"{c.mean[i]:.4g}{spread}")
    lines.append([series, f"{at:g}", *cells, str(seeds)])
  return lines


def picture(figure: Figure, kind: str) -> bytes:
  """Returns a figure as "png" or "svg", the same for the same figure."""
  dated = {"Date": None} if kind == "svg" else None
  with matplotlib.rc_context({"svg.hashsalt": "study"}):
    figure.savefig(buffer := io.BytesIO(), format=kind, dpi=140, metadata=dated)
  return buffer.getvalue()
