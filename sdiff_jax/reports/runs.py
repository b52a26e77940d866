"""A self-contained HTML page about finished runs, and its table as plain text."""

import datetime
import io
import json
import pathlib
from collections.abc import Callable, Iterable
from html import escape
from typing import NamedTuple

import numpy as np

from sdiff_jax import losses, registry
from sdiff_jax.io import file_io, records
from sdiff_jax.reports import html
from sdiff_jax.training import metric_writer
from sdiff_jax.types import Json, UserError


def _seconds(value: float) -> str:
  """Returns a time with a prefix of its unit, such as "12.00 ms"."""
  from matplotlib.ticker import EngFormatter  # slow to import

  return EngFormatter("s", 2)(value)


def _short(value: float) -> str:
  """Returns a number with a prefix, such as "2.6 M" for 2,560,000."""
  from matplotlib.ticker import EngFormatter  # slow to import

  return EngFormatter(places=1, sep="\u202f")(value)


# Header, key in the results, format, description.
Column = tuple[str, str, Callable[[Json], str], str]
MODEL_COLUMNS: tuple[Column, ...] = (
  ("Model", "model", str, "run that generated the images"),
  ("Sampler", "sampler", str, "sampler and number of solver steps"),
  ("NFE", "evaluations", "{:.4g}".format, "network evaluations for one image"),
)
COST_COLUMNS: tuple[Column, ...] = (
  ("Images/s", "images_per_second", "{:,.1f}".format, "on the evaluating machine"),
  ("Latency", "latency", _seconds, "time of a batch of one image"),
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
  ("Median", "median", _seconds, "median time of a chunk for one robot"),
  ("p95", "p95", _seconds, "95th percentile of that time"),
)
TEXT_COLUMNS = 2  # the first columns hold text, which is aligned to the left
BASELINES = '<tr><th colspan="{}">Baselines</th></tr>\n'
KINDS = {"model": "", "baseline": BASELINES}  # kind of a result -> HTML above its group

FACTS = (  # label, key in training.json, format
  ("steps", "steps", "{:,}".format),
  ("images", "images", _short),
  ("time", "seconds", lambda s: str(datetime.timedelta(seconds=round(s)))),
  ("parameters", "parameters", _short),
  ("FLOPs", "flops", _short),
)
NUM_GRIDS = 6  # grids of samples during training that are shown of each run

# Colors of a chart: text, grid lines, curves.
LIGHT = ("#5c6370", "#e3e1dc", ("#2f6f9f", "#b4622d"))
DARK = ("#9aa1ad", "#2c3038", ("#74b3e0", "#e29a63"))


class Run(NamedTuple):
  """Contents of a work directory; parts that are missing are empty.

  Attributes:
    path: of the directory.
    kind: of the model, see `title`.
    config: as in config.json.
    metrics: of training, by step.
    training: summary of training, as in training.json.
    rows: results of the job `evaluate`, one for each sampler.
    rollouts: results of the job `rollout`, one for each sampler.
    command: of training.
  """

  path: pathlib.Path
  kind: str
  config: dict
  metrics: list[dict]
  training: dict
  rows: list[dict]
  rollouts: list[dict]
  command: str


def default_columns() -> tuple[Column, ...]:
  """Returns the columns of a table of results.

  Those of metrics are the facts `columns` that feature networks and metrics register.
  """
  metrics = [
    (header, key, form.format, description)
    for kind in ("metrics.features", "metrics")
    for name in registry.names(kind)
    for key, (header, form, description) in registry.lookup(kind, name)
    .facts["columns"]
    .items()
  ]
  unique = {column[1]: column for column in metrics}
  return (*MODEL_COLUMNS, *unique.values(), *COST_COLUMNS)


def write(runs: list[str], path: str) -> str:
  """Writes one page about several work directories.

  Args:
    runs: the work directories.
    path: of the HTML file.

  Returns:
    The path.

  Raises:
    UserError: a directory has no config.json, so nothing was trained there.
  """
  loaded = [_load(run) for run in runs]
  kinds = [run.kind for run in loaded]
  descriptions = [_description(run.config["loss"]) for run in loaded]
  data = [run.config["data"]["name"] for run in loaded]
  title = f"Trained on {_list(data)}: {_list(kinds)}"
  text = html.TEMPLATE.substitute(
    title=escape(title),
    lead=" ".join(dict.fromkeys(filter(None, descriptions))),
    body=_results(loaded) + _samples(loaded) + _rollouts(loaded) + _training(loaded),
  )
  file_io.write_text(path, text)
  return str(path)


def title(loss: dict) -> str:
  """Returns the kind of a model by its section `loss`: teacher, sCD, sCT, ..."""
  if loss["name"] not in registry.names("losses"):  # of a plugin that is not installed
    return loss["name"]
  return losses.facts(loss).title


def _description(loss: dict[str, Json]) -> str:
  """Returns a sentence about the models of a loss, "" if the loss is not known here."""
  try:
    return losses.facts(loss).description
  except UserError:
    return ""


def rows(runs: list[str]) -> list[dict]:
  """Returns the distinct results of the job `evaluate` in several work directories."""
  return _rows([_load(run) for run in runs])


def _rows(runs: list[Run]) -> list[dict]:
  results = [row for run in runs for row in run.rows]
  # Baselines do not depend on the model, so runs on the same data repeat them.
  return [row for k, row in enumerate(results) if row not in results[:k]]


def table(rows: list[dict], columns: tuple[Column, ...] | None = None) -> str:
  """Returns results as a text table for a terminal: models, a rule, baselines.

  Written by hand because `tabulate` has no rule between groups of rows.

  Args:
    rows: the results, one for each sampler.
    columns: default to those of the job `evaluate`; columns without a value are left
      out.
  """
  shown = _used(rows, default_columns() if columns is None else columns)
  lines: list = [[header for header, *_ in shown]]
  for kind in KINDS:
    group = [_cells(row, "-", shown) for row in rows if row["kind"] == kind]
    lines += [None, *group] if group else []
  widths = [max(map(len, column)) for column in zip(*filter(None, lines), strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if k < TEXT_COLUMNS else cell.rjust(width)
      for k, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in (line or ["-" * width for width in widths] for line in lines)
  )


def _load(directory: str) -> Run:
  path = pathlib.Path(directory)

  def read(name: str, missing: Json) -> Json:
    return records.read_json(path / name) if (path / name).exists() else missing

  config, command = read("config.json", None), path / "command.txt"
  if config is None:
    raise UserError(
      f"{directory}: no config.json; make a run with --workdir={directory} --job=train"
    )
  return Run(
    path=path,
    kind=title(config["loss"]),
    config=config,
    metrics=metric_writer.read_metrics(path),
    training=read("training.json", {}),
    rows=read("evaluate/results.json", []),
    rollouts=read("rollout/results.json", []),
    command=command.read_text("utf-8").strip() if command.exists() else "",
  )


def _used(rows: list[dict], columns: tuple[Column, ...]) -> tuple[Column, ...]:
  """Returns the columns that some result has."""
  return tuple(c for c in columns if any(c[1] in row for row in rows))


def _cells(row: dict, missing: str, columns: tuple[Column, ...]) -> list[str]:
  """Returns the cells of a result as text, `missing` for None and NaN."""
  values = [(row.get(key), form) for _, key, form, _ in columns]
  return [missing if v is None or v != v else form(v) for v, form in values]


def _results(runs: list[Run]) -> str:
  """Returns the table of the results of all runs, and what its columns mean."""
  rows = _rows(runs)
  if not rows:
    return ""
  counts = _list(f"{row['images']:,}" for row in rows)
  samples = f"<dt>Samples</dt><dd>{counts} images for each result</dd>\n"
  return f"<h2>Results</h2>\n{_table(rows, default_columns(), samples)}"


def _table(rows: list[dict], columns: tuple[Column, ...], more: str) -> str:
  """Returns a table of results, and a list of what its columns mean.

  Args:
    rows: the results.
    columns: those without a value are left out.
    more: further items of the list, HTML.
  """
  bodies, columns = "", _used(rows, columns)
  for kind, above in KINDS.items():
    cells = [_cells(row, "–", columns) for row in rows if row["kind"] == kind]
    lines, above = "".join(html.row("td", c) for c in cells), above.format(len(columns))
    bodies += f'<tbody class="{kind}">\n{above}{lines}</tbody>\n' if lines else ""
  head = html.row("th", [header for header, *_ in columns])
  meanings = "".join(f"<dt>{c[0]}</dt><dd>{c[-1]}</dd>\n" for c in columns)
  return (
    f'<div class="wide"><table>\n<thead>\n{head}</thead>\n{bodies}'
    f'</table></div>\n<dl class="meanings">\n{meanings}{more}</dl>\n'
  )


def _rollouts(runs: list[Run]) -> str:
  """Returns the results of policies: a table, and videos side by side."""
  results = [(run.path / "rollout", row) for run in runs for row in run.rollouts]
  if not results:
    return ""
  rows, figures = [row for _, row in results], ""
  for folder, row in results:
    model, sampler = map(escape, _cells(row, "–", ROLLOUT_COLUMNS)[:TEXT_COLUMNS])
    video = folder / f"{row['sampler'].replace('/', '_')}.gif"
    figures += _figure(video, f"<b>{model}</b> {sampler}")
  counts = _list(f"{row['episodes']:,}" for row in rows)
  episodes = f"<dt>Episodes</dt><dd>{counts}, the same for each result</dd>\n"
  table = _table(rows, ROLLOUT_COLUMNS, episodes)
  return f"<h2>Episodes of Push-T</h2>\n{table}{_tiles('18rem', figures)}"


def _samples(runs: list[Run]) -> str:
  """Returns the grids of samples of the evaluation side by side."""
  figures = ""
  results = [(run.path / "evaluate", row) for run in runs for row in run.rows]
  for folder, row in sorted(results, key=lambda pair: [*KINDS].index(pair[1]["kind"])):
    model, sampler, evaluations = map(escape, _cells(row, "–", MODEL_COLUMNS))
    caption = f"<b>{model}</b> {sampler}, NFE {evaluations}"
    figures += _figure(folder / row["grid"], caption) if row.get("grid") else ""
  note = "<p>All grids use the same seeds: image k starts from the same noise.</p>"
  return figures and f"<h2>Samples</h2>\n{note}\n{_tiles('18rem', figures)}"


def _training(runs: list[Run]) -> str:
  """Returns facts, curves, samples, command and config of each run."""
  articles = "".join(
    f"<article>\n<h3>{escape(run.kind)} <span>{escape(str(run.path))}</span></h3>\n"
    f'<dl class="facts">\n{_facts(run)}</dl>\n{_charts(run.metrics)}{_training_grids(run.path)}'
    f"{run.command and f'<pre>{escape(run.command)}</pre>'}\n"
    "<details><summary>Configuration</summary>"
    f"<pre>{escape(json.dumps(run.config, indent=2))}</pre></details>\n</article>\n"
    for run in runs
  )
  return f"<h2>Training</h2>\n{articles}"


def _facts(run: Run) -> str:
  facts = {"network": run.config["model"]["name"], "data": run.config["data"]["name"]}
  facts["batch"] = str(run.config["train"]["batch_size"])
  values = {key: value for key, value in run.training.items() if value is not None}
  facts |= {label: form(values[key]) for label, key, form in FACTS if key in values}
  pairs = ((label, escape(value)) for label, value in facts.items())
  return "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>\n" for k, v in pairs)


def _charts(metrics: list[dict]) -> str:
  """Returns charts of the loss and of the norms, in light and in dark colors."""
  pictures = ""
  for names in (("loss",), ("gradient_norm", "tangent_norm")):
    curves = {}
    for name in names:
      points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
      curves |= {name.replace("_", " "): np.array(points).T} if points else {}
    if curves:
      light, dark = (
        html.uri(_chart(curves, colors), "svg+xml") for colors in (LIGHT, DARK)
      )
      pictures += (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_list(curves)} by step"></picture>\n'
      )
  return _tiles("26rem", pictures)


def _chart(curves: dict[str, np.ndarray], colors: tuple) -> bytes:
  """Draws curves as an SVG.

  Args:
    curves: name -> steps and values, [2, N].
    colors: of text, grid lines and curves.
  """
  from matplotlib.figure import Figure  # slow to import
  from matplotlib.ticker import EngFormatter

  text_color, line_color, curve_colors = colors
  figure = Figure(figsize=(5.6, 3), layout="constrained")
  axes = figure.subplots(subplot_kw={"frameon": False})
  for (name, (steps, values)), color in zip(curves.items(), curve_colors, strict=False):
    axes.plot(steps, values, color=color, linewidth=1.3, label=name)
  values = np.concatenate([curve[1] for curve in curves.values()])
  if values.min() > 0 and values.max() > 10 * values.min():
    axes.set_yscale("log")
  axes.xaxis.set_major_formatter(EngFormatter(sep=""))
  axes.set_xlabel("step", color=text_color)
  axes.tick_params(which="both", colors=text_color, length=0)
  axes.grid(color=line_color, linewidth=0.7)
  figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=text_color)
  figure.savefig(buffer := io.BytesIO(), format="svg", transparent=True)
  return buffer.getvalue()


def _training_grids(run: pathlib.Path) -> str:
  """Returns a few grids of samples during training, from the first to the last."""
  paths = sorted((run / "samples").glob("*_*.png"))
  count = min(len(paths), NUM_GRIDS)
  indices = np.linspace(0, len(paths) - 1, count).round().astype(int)
  figures = ""
  for path in (paths[k] for k in indices):
    name, _, step = path.stem.rpartition("_")
    figures += _figure(path, escape(f"{name}, step {step.lstrip('0') or '0'}"))
  return _tiles("8rem", figures)


def _tiles(width: str, content: str) -> str:
  return content and f'<div class="tiles" style="--tile: {width}">\n{content}</div>\n'


def _figure(path: pathlib.Path, caption: str) -> str:
  """Returns an image with a caption, which is HTML; nothing if the file is missing."""
  if not path.exists():
    return ""
  uri = html.uri(path.read_bytes(), path.suffix[1:])
  image = f'<img src="{uri}" alt="{escape(path.stem)}">'
  return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"


def _list(words: Iterable[str]) -> str:
  """Returns the distinct words as a list in a sentence: a, b and c."""
  *others, last = dict.fromkeys(words)
  return f"{', '.join(others)} and {last}" if others else last
