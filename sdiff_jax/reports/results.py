"""Results of the jobs `evaluate` and `rollout`: their files, columns and text tables."""

import os
from collections.abc import Callable
from typing import Annotated, Literal, TypedDict

import msgspec

from sdiff_jax import registry
from sdiff_jax.io import file_io, records
from sdiff_jax.types import Json


def seconds(value: float) -> str:
  """Returns a time with a prefix of its unit, such as "12.00 ms"."""
  from matplotlib.ticker import EngFormatter  # slow to import

  return EngFormatter("s", 2)(value)


# Header, key in the results, format, description.
Column = tuple[str, str, Callable[[Json], str], str]
MODEL_COLUMNS: tuple[Column, ...] = (
  ("Model", "model", str, "run that generated the images"),
  ("Sampler", "sampler", str, "sampler and number of solver steps"),
  ("NFE", "evaluations", "{:.4g}".format, "network evaluations for one image"),
)
COST_COLUMNS: tuple[Column, ...] = (
  ("Images/s", "images_per_second", "{:,.1f}".format, "on the evaluating machine"),
  ("Latency", "latency", seconds, "time of a batch of one image"),
  ("Compute", "compute", "{:.1%}".format, "training FLOPs; the teacher's are 100%"),
)
ROLLOUT_COLUMNS: tuple[Column, ...] = (
  ("Model", "model", str, "run that the policy comes from"),
  ("Sampler", "sampler", str, "sampler of the actions and number of solver steps"),
  ("Reward", "reward", "{:.3f}".format, "mean over episodes of the largest reward"),
  ("+-", "error", "{:.3f}".format, "standard error of the reward"),
  ("Gain", "difference", "{:+.3f}".format, "paired difference to the first sampler"),
  ("+-", "difference_error", "{:.3f}".format, "standard error of the difference"),
  ("Solved", "solved", "{:.0%}".format, "fraction of episodes that reached the goal"),
  ("Calls", "passes", "{:.1f}".format, "sequential network calls for a chunk"),
  ("NFE", "evaluations", "{:.1f}".format, "network evaluations for a chunk"),
  ("Median", "median", seconds, "median time of a chunk for one robot"),
  ("p95", "p95", seconds, "95th percentile of that time"),
)
TEXT_COLUMNS = 2  # the first columns hold text, which is aligned to the left
KINDS = ("model", "baseline")  # groups of a table, in this order

Number = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)] | None
FileName = Annotated[str, msgspec.Meta(pattern=r"^[^/\\\x00]{1,250}\.png$")]


class _Names(TypedDict):
  model: records.Name
  sampler: records.Name
  kind: Literal["model", "baseline"]


class Result(_Names, total=False):
  """A row of results.json; its other entries are metrics and costs.

  Attributes:
    model: title of the model.
    sampler: name of the sampler and its number of steps.
    kind: group of the table.
    images: number of images that were evaluated.
    episodes: number of episodes of a policy.
    grid: name of the file of a grid of samples, in the same folder.
  """

  images: records.Count
  episodes: records.Count
  grid: FileName | None


def metric_columns() -> tuple[Column, ...]:
  """Returns the columns of metrics, which feature networks and metrics register."""
  metrics = [
    (header, key, form.format, description)
    for kind in ("metrics.features", "metrics")
    for name in registry.names(kind)
    for key, (header, form, description) in registry.lookup(kind, name)
    .facts["columns"]
    .items()
  ]
  unique = {column[1]: column for column in metrics}
  return (*unique.values(),)


def default_columns() -> tuple[Column, ...]:
  """Returns the columns of a table of results."""
  return (*MODEL_COLUMNS, *metric_columns(), *COST_COLUMNS)


def read(
  path: str | os.PathLike[str], columns: tuple[Column, ...] | None = None
) -> list[Result]:
  """Returns the rows of a results.json.

  NaN, which earlier versions wrote, is null.

  Args:
    path: of the file.
    columns: whose values are numbers or null; by default those of the job `evaluate`.

  Raises:
    UserError: there is no such file, or it is damaged.
  """
  remedy = "remove it and repeat the job that wrote it"
  rows = file_io.without_nan(records.read_json(path, remedy, any_number=True))
  records.check(rows, list[Result], str(path), remedy)
  columns = default_columns() if columns is None else columns
  numbers = {key for _, key, *_ in columns[TEXT_COLUMNS:]}
  for number, row in enumerate(rows):
    values = {key: value for key, value in row.items() if key in numbers}
    records.check(values, dict[str, Number], f"{path}: [{number}]", remedy)
  return rows


def distinct(rows: list[Result]) -> list[Result]:
  """Returns the rows without repetitions, in the same order.

  Args:
    rows: of several runs; baselines do not depend on the model, so runs on the same
      data repeat them.
  """
  return [row for k, row in enumerate(rows) if row not in rows[:k]]


def table(rows: list[Result], columns: tuple[Column, ...] | None = None) -> str:
  """Returns results as a text table for a terminal: models, a rule, baselines.

  Written by hand because `tabulate` has no rule between groups of rows.

  Args:
    rows: the results, one for each sampler.
    columns: default to those of the job `evaluate`; columns without a value are left
      out.
  """
  shown = used(rows, default_columns() if columns is None else columns)
  lines: list = [[header for header, *_ in shown]]
  for kind in KINDS:
    group = [cells(row, "-", shown) for row in rows if row["kind"] == kind]
    lines += [None, *group] if group else []
  lines = [line and [_printable(cell) for cell in line] for line in lines]
  widths = [max(map(len, column)) for column in zip(*filter(None, lines), strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if k < TEXT_COLUMNS else cell.rjust(width)
      for k, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in (line or ["-" * width for width in widths] for line in lines)
  )


def _printable(text: str) -> str:
  """Returns a text without control characters, which a terminal would obey."""
  return "".join(c if c.isprintable() else "?" for c in text)


def used(rows: list[Result], columns: tuple[Column, ...]) -> tuple[Column, ...]:
  """Returns the columns that some result has."""
  return tuple(c for c in columns if any(c[1] in row for row in rows))


def cells(row: Result, missing: str, columns: tuple[Column, ...]) -> list[str]:
  """Returns the cells of a result as text, `missing` for None and NaN."""
  values = [(row.get(key), form) for _, key, form, _ in columns]
  return [missing if v is None or v != v else form(v) for v, form in values]
