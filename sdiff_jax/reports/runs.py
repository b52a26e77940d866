"""A self-contained HTML page about finished runs, and its table as plain text."""

import datetime
import io
import json
import pathlib
from collections.abc import Iterable
from html import escape

import numpy as np

from sdiff_jax.io import file_io, storage
from sdiff_jax.reports import html, loading, results
from sdiff_jax.reports.loading import Run
from sdiff_jax.reports.results import Column
from sdiff_jax.training import goodput
from sdiff_jax.training.profiling import Operations
from sdiff_jax.types import Json


def _short(value: float) -> str:
  """Returns a number with a prefix, such as "2.6 M" for 2,560,000."""
  from matplotlib.ticker import EngFormatter  # slow to import

  return EngFormatter(places=1, sep="\u202f")(value)


# Kind of a result -> HTML above its group.
GROUPS = {"model": "", "baseline": '<tr><th colspan="{}">Baselines</th></tr>\n'}
FACTS = (  # label, key in training.json, format
  ("steps", "steps", "{:,}".format),
  ("images", "images", _short),
  ("time", "seconds", lambda s: str(datetime.timedelta(seconds=round(s)))),
  ("parameters", "parameters", _short),
  ("FLOPs", "flops", _short),
)
MAX_DRAWN = 1e30  # larger values are left out of charts
FEW_POINTS = 20  # of a curve, which are marked
NUM_GRIDS = 6  # grids of samples during training that are shown of each run

# Colors of a chart: text, grid lines, curves.
LIGHT = ("#5c6370", "#e3e1dc", ("#2f6f9f", "#b4622d"))
DARK = ("#9aa1ad", "#2c3038", ("#74b3e0", "#e29a63"))


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
  loaded = [loading.load(run) for run in runs]
  write_page(loaded, path)
  return str(path)


def write_page(runs: list[Run], path: str, faults: Iterable[str] = ()) -> list[str]:
  """Writes one page about several runs.

  Files that cannot be read are named at the end of the page.

  Args:
    runs: contents of the work directories.
    path: of the HTML file.
    faults: one line for each run that cannot be read.

  Returns:
    One line for each run and file that cannot be read.
  """
  configs = [run.config for run in runs if run.config]
  lead = [loading.description(config["loss"]) for config in configs]
  data = [config["data"]["name"] for config in configs]
  title = f"Trained on {_list(data)}: " if data else ""
  title += _list(run.kind for run in runs)
  body = _results(runs) + _samples(runs) + _rollouts(runs) + _training(runs)
  lines = [*faults, *(fault for run in runs for fault in run.faults)]
  text = html.TEMPLATE.substitute(
    title=escape(title),
    lead=" ".join(dict.fromkeys(filter(None, lead))),
    body=body + _faults(lines),
  )
  # Names of files need not be UTF-8.
  file_io.write_bytes(path, text.encode("utf-8", "backslashreplace"))
  return lines


def _faults(lines: list[str]) -> str:
  """Returns the list of the files that cannot be read."""
  items = "".join(f"<li>{escape(line)}</li>\n" for line in lines)
  return items and f"<h2>Not shown</h2>\n<ul>\n{items}</ul>\n"


def _results(runs: list[Run]) -> str:
  """Returns the table of the results of all runs, and what its columns mean."""
  rows = results.distinct([row for run in runs for row in run.rows])
  if not rows:
    return ""
  counts = _list(f"{row['images']:,}" for row in rows if "images" in row)
  samples = f"<dt>Samples</dt><dd>{counts} images for each result</dd>\n"
  return f"<h2>Results</h2>\n{_table(rows, results.default_columns(), samples)}"


def _table(rows: list[dict], columns: tuple[Column, ...], more: str) -> str:
  """Returns a table of results, and a list of what its columns mean.

  Args:
    rows: the results.
    columns: those without a value are left out.
    more: further items of the list, HTML.
  """
  bodies, columns = "", results.used(rows, columns)
  for kind, above in GROUPS.items():
    cells = [results.cells(row, "–", columns) for row in rows if row["kind"] == kind]
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
  pairs = [(run, row) for run in runs for row in run.rollouts]
  if not pairs:
    return ""
  rows, figures = [row for _, row in pairs], ""
  for run, row in pairs:
    video = run.path / "rollout" / f"{row['sampler'].replace('/', '_')}.gif"
    caption = f"<b>{escape(row['model'])}</b> {escape(row['sampler'])}"
    figures += _figure(run, video, caption)
  counts = _list(f"{row['episodes']:,}" for row in rows if "episodes" in row)
  episodes = f"<dt>Episodes</dt><dd>{counts}, the same for each result</dd>\n"
  table = _table(rows, results.ROLLOUT_COLUMNS, episodes)
  return f"<h2>Episodes of Push-T</h2>\n{table}{_tiles('18rem', figures)}"


def _samples(runs: list[Run]) -> str:
  """Returns the grids of samples of the evaluation side by side."""
  figures = ""
  pairs = [(run, row) for run in runs for row in run.rows if row.get("grid")]
  for run, row in sorted(pairs, key=lambda pair: [*GROUPS].index(pair[1]["kind"])):
    texts = results.cells(row, "–", results.MODEL_COLUMNS)
    model, sampler, evaluations = map(escape, texts)
    caption = f"<b>{model}</b> {sampler}, NFE {evaluations}"
    figures += _figure(run, run.path / "evaluate" / row["grid"], caption)
  note = "<p>All grids use the same seeds: image k starts from the same noise.</p>"
  return figures and f"<h2>Samples</h2>\n{note}\n{_tiles('18rem', figures)}"


def _training(runs: list[Run]) -> str:
  """Returns facts, curves, samples, command and config of each run."""
  articles = "".join(
    f"<article>\n<h3>{escape(run.kind)} <span>{escape(str(run.path))}</span></h3>\n"
    f'<dl class="facts">\n{_facts(run)}</dl>\n{_charts(run.metrics)}{_training_grids(run)}'
    f"{_spent(run.training.get('goodput', {}))}{_operations(run.operations)}"
    f"{run.command and f'<pre>{escape(run.command)}</pre>'}\n"
    f"{_config(run.config)}</article>\n"
    for run in runs
  )
  return f"<h2>Training</h2>\n{articles}"


def _config(config: dict[str, Json]) -> str:
  if not config:
    return ""
  text = escape(json.dumps(config, indent=2))
  return f"<details><summary>Configuration</summary><pre>{text}</pre></details>\n"


def _facts(run: Run) -> str:
  facts = {}
  if run.config:
    facts["network"] = run.config["model"]["name"]
    facts["data"] = run.config["data"]["name"]
  if "batch_size" in run.config.get("train", {}):
    facts["batch"] = str(run.config["train"]["batch_size"])
  values = {key: value for key, value in run.training.items() if value is not None}
  facts |= {label: form(values[key]) for label, key, form in FACTS if key in values}
  pairs = ((label, escape(value)) for label, value in facts.items())
  return "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>\n" for k, v in pairs)


def _spent(seconds: dict[str, float]) -> str:
  """Returns a table of what the seconds of a run were spent on."""
  total = sum(seconds.get(name, 0.0) for name in goodput.SPENT)
  if not total:
    return ""
  lines = [
    [
      name,
      goodput.MEANINGS[name],
      f"{seconds[name]:,.1f}",
      f"{seconds[name] / total:.1%}",
    ]
    for name in goodput.SPENT
    if seconds.get(name)
  ]
  starts = int(seconds.get("starts", 1))
  text = f"Time of {starts} start{'s' if starts > 1 else ''} of this run"
  table = html.table(["Phase", "Meaning", "Seconds", "Share"], lines)
  return f"<details><summary>{text}</summary>{table}</details>\n"


def _operations(found: Operations | dict[str, Json]) -> str:
  """Returns a table of the costliest operations of a trace."""
  if not found or not found["seconds"]:
    return ""
  lines = [
    [
      operation["name"][:80],
      f"{operation['count']:,}",
      f"{1e3 * operation['seconds']:,.3f}",
      f"{operation['seconds'] / found['seconds']:.1%}",
    ]
    for operation in found["operations"]
  ]
  text = f"Costliest operations of {found['steps']} steps from step {found['first']} on"
  device = f", {found['device']}" if "device" in found else ""
  table = html.table(["Operation", "Runs", "Milliseconds", "Share"], lines)
  return f"<details><summary>{escape(text + device)}</summary>{table}</details>\n"


def _charts(metrics: list[dict]) -> str:
  """Returns charts of the loss, of norms and of metrics, in light and in dark colors."""
  pictures = ""
  titles = {key: header for header, key, *_ in results.metric_columns()}
  singles = [(key,) for key in titles]
  for names in (("loss",), ("gradient_norm", "tangent_norm"), *singles):
    curves = {}
    for name in names:
      points = [(m["step"], m[name]) for m in metrics if _is_drawn(m.get(name))]
      title = titles.get(name, name.replace("_", " "))
      curves |= {title: np.array(points).T} if points else {}
    if curves:
      light, dark = (
        html.uri(_chart(curves, colors), "svg+xml") for colors in (LIGHT, DARK)
      )
      pictures += (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_list(curves)} by step"></picture>\n'
      )
  return _tiles("26rem", pictures)


def _is_drawn(value: float | None) -> bool:
  """Returns whether a metric is finite and below what Matplotlib can draw."""
  return value is not None and abs(value) < MAX_DRAWN


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
    marker = "." if len(steps) <= FEW_POINTS else None
    axes.plot(steps, values, color=color, linewidth=1.3, marker=marker, label=name)
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


def _training_grids(run: Run) -> str:
  """Returns a few grids of samples during training, from the first to the last."""
  paths = [*map(storage.of, storage.glob(run.path / "samples", "*_*.png"))]
  count = min(len(paths), NUM_GRIDS)
  indices = np.linspace(0, len(paths) - 1, count).round().astype(int)
  figures = ""
  for path in (paths[k] for k in indices):
    name, _, step = path.stem.rpartition("_")
    figures += _figure(run, path, escape(f"{name}, step {step.lstrip('0') or '0'}"))
  return _tiles("8rem", figures)


def _tiles(width: str, content: str) -> str:
  return content and f'<div class="tiles" style="--tile: {width}">\n{content}</div>\n'


def _figure(run: Run, path: pathlib.Path, caption: str) -> str:
  """Returns an image with a caption, which is HTML; nothing if the file is missing.

  The error of a file that cannot be read is added to those of the run.
  """
  if not storage.lexists(path):
    return ""
  content = loading.tolerant(run.faults, b"", file_io.read_bytes, path)
  if not content:
    return ""
  uri = html.uri(content, path.suffix[1:])
  image = f'<img src="{uri}" alt="{escape(path.stem)}">'
  return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"


def _list(words: Iterable[str]) -> str:
  """Returns the distinct words as a list in a sentence: a, b and c."""
  *others, last = dict.fromkeys(words) or [""]
  return f"{', '.join(others)} and {last}" if others else last
