"""Figures and tables of studies."""

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sdiff_jax.types import Json

if TYPE_CHECKING:  # slow to import
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

LABELS = {  # of axes
  "compute": "training FLOPs / the teacher's",
  "d_t": "rms of cos t sin t $\\sigma_d$ ∂F/∂t",
  "error": "rms difference / rms of the sequential",
  "evaluations": "network evaluations per image",
  "flops": "training FLOPs",
  "frechet": "Frechet distance",
  "grad_x": "rms of cos t sin t ∇F dx/dt",
  "latency": "seconds for a batch of one image",
  "passes": "sequential network calls",
  "ratio": "Frechet distance / the teacher's",
  "seconds": "seconds per image, in batches",
}
# Axes that are measured: results of one sampler, at its median, are one point.
TIMES = ("seconds", "latency")
MAX_COLUMNS = 3  # of panels


Panel = str | tuple[str, str]  # y, or x and y

LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
COLORS = 10  # of matplotlib's cycle


class Curve(NamedTuple):
  """A series in a panel: statistics over seeds.

  Attributes:
    x: horizontal coordinate of each point, [P].
    mean: over the seeds, [P].
    low: minimum over the seeds, [P].
    high: maximum over the seeds, [P].
    std: standard deviation over the seeds, [P].
    seeds: smallest number of seeds of a point.
    names: samplers of the points if x is one of TIMES, else ().
  """

  x: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  std: np.ndarray
  seeds: int
  names: tuple[str, ...]


def value(row: dict[str, Json], key: str) -> float | None:
  """Returns a number of a point, None if it has none.

  Args:
    row: the point.
    key: of the number; "y@key=value" is that of y, of points with another value of key
      None.

  Example:
    >>> row = {"frechet": 0.5, "evaluations": 2.0}
    >>> value(row, "frechet@evaluations=2"), value(row, "frechet@evaluations=1")
    (0.5, None)
  """
  name, _, condition = key.partition("@")
  where, _, wanted = condition.partition("=")
  if row.get(where) is not None and f"{row[where]:g}" != wanted:
    return None
  return row.get(name)


def label(key: str) -> str:
  """Returns the label of an axis or a column.

  Args:
    key: see `value`.

  Example:
    >>> label("frechet@evaluations=2")
    'Frechet distance, evaluations=2'
  """
  name, _, condition = key.partition("@")
  text = LABELS.get(name, name.replace("_", " "))
  return f"{text}, {condition}" if condition else text


def curves(rows: list[dict[str, Json]], x: str, y: str) -> dict[str, Curve]:
  """Returns the curve of each series.

  Args:
    rows: points {"series": ..., "seed": ..., x: number, y: number}; those without one
      of the numbers are left out. Points of a series with the same x are its seeds. If x
      is one of TIMES, the points of the same sampler are, and x is their median.
    x: key of the horizontal axis.
    y: key of the vertical axis, see `value`.

  Returns:
    series -> curve.

  Example:
    >>> rows = [{"series": "a", "seed": k, "x": 1, "y": float(k)} for k in (0, 1)]
    >>> float(curves(rows, "x", "y")["a"].mean[0])
    0.5
  """
  by_series: dict[str, dict[float | str, list[tuple[float, float]]]] = {}
  for row in rows:
    number = value(row, y)
    if row.get(x) is not None and number is not None:
      # Fractions of FLOPs at the same step may differ in their last digits.
      at = float(f"{row[x]:.4g}")
      point = row["sampler"] if x in TIMES else at
      by_series.setdefault(row["series"], {}).setdefault(point, []).append((at, number))
  out = {}
  for series, points in by_series.items():
    at = {point: np.median([p[0] for p in pairs]) for point, pairs in points.items()}
    order = sorted(points, key=at.get)
    values = [np.array([p[1] for p in points[point]]) for point in order]
    numbers = [[f(v) for v in values] for f in (np.mean, np.min, np.max, np.std)]
    mean, low, high, std = map(np.array, numbers)
    seeds = min(len(v) for v in values)
    names = tuple(order) if x in TIMES else ()
    coordinates = np.array([at[point] for point in order])
    out[series] = Curve(coordinates, mean, low, high, std, seeds, names)
  return out


def axes_of(x: str, panels: tuple[Panel, ...]) -> list[tuple[str, str]]:
  """Returns the keys of the axes of each panel, (x, y)."""
  return [(x, panel) if isinstance(panel, str) else tuple(panel) for panel in panels]


def _annotate(
  axes: "Axes", text: str, at: tuple[float, float], corner: int, color: str
) -> None:
  """Writes a text at a corner (0 to 3) of a point, so that texts do not overlap."""
  right, above = corner % 2 == 0, corner < 2
  axes.annotate(
    text,
    at,
    (3 if right else -3, 3 if above else -3),
    textcoords="offset points",
    horizontalalignment="left" if right else "right",
    verticalalignment="bottom" if above else "top",
    fontsize=7,
    color=color,
  )


def draw(
  rows: list[dict[str, Json]], x: str, panels: tuple[Panel, ...], log: str
) -> "Figure":
  """Returns a figure with a panel for each key: mean and range of every series.

  Args:
    rows: see `curves`.
    x: key of the horizontal axis.
    panels: see `Panel`; a line has at most MAX_COLUMNS of them.
    log: logarithmic axes, "", "x", "y" or "xy".
  """
  from matplotlib.figure import Figure  # slow to import
  from matplotlib.ticker import FormatStrFormatter, LogLocator

  columns = min(len(panels), MAX_COLUMNS)
  lines = -(-len(panels) // columns)
  size = (4.2 * columns + 1.6, 3.4 * lines)
  figure = Figure(figsize=size, layout="constrained", facecolor="white")
  contents = [(keys, curves(rows, *keys)) for keys in axes_of(x, panels)]
  styles = _styles([name for _, panel in contents for name in panel])
  labels = {}
  for k, ((across, y), panel) in enumerate(contents):
    axes = figure.add_subplot(lines, columns, k + 1)
    for n, (series, c) in enumerate(panel.items()):
      color, dashes, marker = styles[series]
      style = {"color": color, "linestyle": dashes, "markersize": 4}
      style["marker"] = marker if len(c.x) < 30 else None
      (line,) = axes.plot(c.x, c.mean, **style)
      axes.fill_between(c.x, c.low, c.high, color=color, alpha=0.2, linewidth=0)
      labels.setdefault(series, line)
      for at, value, name in zip(c.x, c.mean, c.names, strict=False):
        _annotate(axes, name.rpartition("/")[2], (at, value), n % 4, color)
    y, _, condition = y.partition("@")
    axes.set(xlabel=label(across), ylabel=label(y), title=condition.replace("=", " = "))
    if y.startswith("ratio"):
      axes.axhline(1, color="0.7", linewidth=1, zorder=0)
    for name in set(log) & {"x", "y"}:
      getattr(axes, f"set_{name}scale")("log")
      axis = getattr(axes, f"{name}axis")
      low, high = axis.get_data_interval()
      axis.set_major_formatter(FormatStrFormatter("%g"))
      if high < 10 * low:
        axis.set_minor_formatter(FormatStrFormatter("%g"))
        if high > 3 * low:  # there is room for a few more
          axis.set_minor_locator(LogLocator(subs=(2, 3, 4, 6, 8)))
      elif high < 100 * low:  # above, labels at powers of ten are enough
        axis.set_minor_formatter(FormatStrFormatter("%g"))
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
  figure.legend(
    labels.values(), labels, loc="outside right center", frameon=False, fontsize=8
  )
  return figure


def _styles(names: list[str]) -> dict[str, tuple[str, str, str]]:
  """Returns the color, line style and marker of each series.

  Series whose names differ only after the last comma share a color. Where colors repeat,
  line styles and markers differ.
  """
  members: dict[str, list[str]] = {}
  for name in dict.fromkeys(names):
    members.setdefault(name.rpartition(", ")[0] or name, []).append(name)
  return {
    name: (f"C{i % COLORS}", LINES[k % len(LINES)], MARKERS[k % len(MARKERS)])
    for i, group in enumerate(members.values())
    for k, name in enumerate(group, i // COLORS)
  }


def tables(
  rows: list[dict[str, Json]], x: str, panels: tuple[Panel, ...]
) -> list[list[list[str]]]:
  """Returns a table for each horizontal axis, see `table`."""
  by_x: dict[str, list[str]] = {}
  for at, y in axes_of(x, panels):
    by_x.setdefault(at, []).append(y)
  return [table(rows, at, tuple(keys)) for at, keys in by_x.items()]


def table(
  rows: list[dict[str, Json]], x: str, panels: tuple[str, ...]
) -> list[list[str]]:
  """Returns lines of cells, the header first: series, x, and mean ± std over seeds."""
  lines = [["", label(x), *map(label, panels), "seeds"]]
  by_panel = [curves(rows, x, y) for y in panels]
  points = dict.fromkeys(
    (series, at) for panel in by_panel for series, c in panel.items() for at in c.x
  )
  for series, at in points:
    cells, seeds, name = [], 0, series
    for panel in by_panel:
      c = panel.get(series)
      if c is None or at not in c.x:
        cells.append("-")
        continue
      i, seeds = int(np.flatnonzero(c.x == at)[0]), c.seeds
      name = ", ".join((series, *c.names[i : i + 1]))
      spread = f" ± {c.std[i]:.2g}" if seeds > 1 else ""
      cells.append(f"{c.mean[i]:.4g}{spread}")
    lines.append([name, f"{at:g}", *cells, str(seeds)])
  return lines


def picture(figure: "Figure", kind: str) -> bytes:
  """Returns a figure as "png" or "svg", with the same bytes for the same figure."""
  import matplotlib  # slow to import

  metadata = {"Date": None} if kind == "svg" else None
  with matplotlib.rc_context({"svg.hashsalt": "study"}):
    figure.savefig(buffer := io.BytesIO(), format=kind, dpi=140, metadata=metadata)
  return buffer.getvalue()
