"""One self-contained HTML page about finished runs, and its table as plain text."""

import datetime
import io
import json
import pathlib
from collections.abc import Iterable
from html import escape
from typing import NamedTuple

import numpy as np

from sdiff_jax import losses
from sdiff_jax.reports import html
from sdiff_jax.training import metric_writer
from sdiff_jax.types import UserError


def _seconds(value: float) -> str:
  """Returns a time with a prefix of its unit, such as "12.00 ms"."""
  from matplotlib.ticker import EngFormatter  # slow to import

  return EngFormatter("s", 2)(value)


def _short(value: float) -> str:
  """Returns a number with a prefix, such as "2.6 M" for 2,560,000."""
  from matplotlib.ticker import EngFormatter  # slow to import

  return EngFormatter(places=1, sep="\u202f")(value)


# Header, key of the row, format, and what the column means; those that no row has are
# not shown.
COLUMNS = (
  ("Model", "model", str, "the run that made the images"),
  ("Sampler", "sampler", str, "how they were drawn: method/steps"),
  ("NFE", "evaluations", "{:.4g}".format, "network evaluations that one image takes"),
  ("Frechet", "frechet", "{:.2f}".format, "distance to real images, lower is better; "
   "in the features of the small classifier that ships with sdiff_jax, scaled to "
   "trace 64: not comparable with FID"),
  ("FID", "fid", "{:.2f}".format, "Frechet distance to real images in features of "
   "Inception-v3, lower is better"),
  ("FD-DINOv2", "fd_dinov2", "{:.1f}".format, "the same in features of DINOv2"),
  ("IS", "inception_score", "{:.2f}".format, "Inception score, higher is better"),
  ("CLIP", "clip_score", "{:.2f}".format, "how well images fit their texts: mean of "
   "100 max(cos, 0) in features of CLIP, higher is better"),
  ("Precision", "precision", "{:.1%}".format, "share that lies among real images"),
  ("Recall", "recall", "{:.1%}".format, "share of real images that they cover"),
  ("Images/s", "images_per_second", "{:,.1f}".format, "on the evaluating machine"),
  ("Latency", "latency", _seconds, "time of one image alone"),
  ("Compute", "compute", "{:.1%}".format, "training FLOPs; the teacher's are 100%"),
)  # fmt: skip
# Of policies, in the same way.
ROLLOUT = (
  ("Model", "model", str, "the run that the policy comes from"),
  ("Sampler", "sampler", str, "how actions were drawn: method/steps"),
  ("Reward", "reward", "{:.3f}".format, "mean over episodes of the largest reward"),
  ("+-", "error", "{:.3f}".format, "its standard error"),
  ("Gain", "difference", "{:+.3f}".format, "reward above the first sampler's, paired"),
  ("+-", "difference_error", "{:.3f}".format, "its standard error, over the episodes"),
  ("Solved", "solved", "{:.0%}".format, "share of episodes that reached the goal"),
  ("Passes", "passes", "{:.1f}".format, "network calls after one another, a chunk"),
  ("NFE", "evaluations", "{:.1f}".format, "network evaluations, a chunk"),
  ("Median", "median", _seconds, "time of a chunk for one robot"),
  ("p95", "p95", _seconds, "that of the slowest 5%"),
)
WORDS = 2  # the first columns hold words, the others numbers
BASELINES = '<tr><th colspan="{}">Baselines</th></tr>\n'
KINDS = {"model": "", "baseline": BASELINES}  # and what stands above their rows

OBJECTIVES = {
  "teacher": "The teacher is a diffusion model, sampled in many steps.",
  "sCD": "sCD is a consistency model, distilled from the teacher.",
  "sCT": "sCT is a consistency model, started from the teacher and trained on data.",
}
FACTS = (  # label, key in training.json, format
  ("steps", "steps", "{:,}".format),
  ("images", "images", _short),
  ("time", "seconds", lambda s: str(datetime.timedelta(seconds=round(s)))),
  ("parameters", "parameters", _short),
  ("FLOPs", "flops", _short),
)
STRIP = 6  # training-time grids shown of each run

# Of a chart: text, grid lines, series.
LIGHT = ("#5c6370", "#e3e1dc", ("#2f6f9f", "#b4622d"))
DARK = ("#9aa1ad", "#2c3038", ("#74b3e0", "#e29a63"))


class Run(NamedTuple):
  """What one work directory holds; parts that are missing are empty."""

  path: pathlib.Path
  kind: str  # named as in its results: teacher, sCD, sCT
  config: dict
  metrics: list[dict]
  training: dict
  rows: list[dict]
  rollouts: list[dict]
  command: str


def write(runs: list[str], path: str) -> str:
  """Writes one page about the work directories `runs` and returns its path.

  Raises:
    UserError: a directory has no config.json, so nothing was trained there.
  """
  loaded = [_load(run) for run in runs]
  kinds = [run.kind for run in loaded]
  data = [run.config["data"]["name"] for run in loaded]
  title = f"Trained on {_list(data)}: {_list(kinds)}"
  text = html.TEMPLATE.substitute(
    title=escape(title),
    lead=" ".join(text for kind, text in OBJECTIVES.items() if kind in kinds),
    body=_results(loaded) + _samples(loaded) + _rollouts(loaded) + _training(loaded),
  )
  out = pathlib.Path(path)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(text, "utf-8")
  return str(path)


def title(loss: dict) -> str:
  """Returns what a run with that section `loss` is called: teacher, sCD, sCT, ..."""
  return losses.facts(loss).title


def rows(runs: list[str]) -> list[dict]:
  """Returns the measured rows of the work directories `runs`, each once."""
  return _rows([_load(run) for run in runs])


def _rows(runs: list[Run]) -> list[dict]:
  found = [row for run in runs for row in run.rows]
  # Baselines do not depend on the model: runs on the same data repeat them.
  return [row for k, row in enumerate(found) if row not in found[:k]]


def table(rows: list[dict], columns: tuple = COLUMNS) -> str:
  """Returns the rows as text aligned for a terminal: models, a rule, baselines."""
  columns = _columns(rows, columns)
  lines: list = [[header for header, *_ in columns]]
  for kind in KINDS:
    group = [_cells(row, "-", columns) for row in rows if row["kind"] == kind]
    lines += [None, *group] if group else []
  widths = [max(map(len, column)) for column in zip(*filter(None, lines), strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if k < WORDS else cell.rjust(width)
      for k, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in (line or ["-" * width for width in widths] for line in lines)
  )


def _load(directory: str) -> Run:
  path = pathlib.Path(directory)

  def read(name: str, missing: str) -> str:
    return (path / name).read_text("utf-8") if (path / name).exists() else missing

  config = json.loads(read("config.json", "null"))
  if config is None:
    raise UserError(
      f"{directory}: no config.json; make a run with --workdir={directory} --job=train"
    )
  return Run(
    path=path,
    kind=title(config["loss"]),
    config=config,
    metrics=metric_writer.read_metrics(path),
    training=json.loads(read("training.json", "{}")),
    rows=json.loads(read("evaluate/results.json", "[]")),
    rollouts=json.loads(read("rollout/results.json", "[]")),
    command=read("command.txt", "").strip(),
  )


def _columns(rows: list[dict], columns: tuple) -> tuple:
  return tuple(c for c in columns if any(c[1] in row for row in rows))


def _cells(row: dict, missing: str, columns: tuple) -> list[str]:
  values = [(row.get(key), form) for _, key, form, _ in columns]
  # NaN, which differs from itself, is as good as null.
  return [missing if v is None or v != v else form(v) for v, form in values]


def _results(runs: list[Run]) -> str:
  """Returns the table of all runs with a line on what each column means."""
  rows = _rows(runs)
  if not rows:
    return ""
  counts = _list(f"{row['images']:,}" for row in rows)
  samples = f"<dt>Samples</dt><dd>{counts} images behind each row</dd>\n"
  return f"<h2>Results</h2>\n{_table(rows, COLUMNS, samples)}"


def _table(rows: list[dict], columns: tuple, more: str) -> str:
  """Returns rows under their columns, what these mean, and more of that."""
  bodies, columns = "", _columns(rows, columns)
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
  """Returns what policies did: a table, and films side by side."""
  found = [(run.path / "rollout", row) for run in runs for row in run.rollouts]
  if not found:
    return ""
  rows, figures = [row for _, row in found], ""
  for folder, row in found:
    model, sampler = map(escape, _cells(row, "–", ROLLOUT)[:WORDS])
    film = folder / f"{row['sampler'].replace('/', '_')}.gif"
    figures += _figure(film, f"<b>{model}</b> {sampler}")
  counts = _list(f"{row['episodes']:,}" for row in rows)
  episodes = f"<dt>Episodes</dt><dd>{counts} behind each row, the same ones</dd>\n"
  table = _table(rows, ROLLOUT, episodes)
  return f"<h2>Episodes of Push-T</h2>\n{table}{_tiles('18rem', figures)}"


def _samples(runs: list[Run]) -> str:
  """Returns the evaluation's grids side by side."""
  figures = ""
  found = [(run.path / "evaluate", row) for run in runs for row in run.rows]
  for folder, row in sorted(found, key=lambda pair: [*KINDS].index(pair[1]["kind"])):
    model, sampler, evaluations = map(escape, _cells(row, "–", COLUMNS[:3]))
    caption = f"<b>{model}</b> {sampler}, NFE {evaluations}"
    figures += _figure(folder / row["grid"], caption) if row.get("grid") else ""
  note = "<p>Same seeds: cell k starts from the same noise in every grid.</p>"
  return figures and f"<h2>Samples</h2>\n{note}\n{_tiles('18rem', figures)}"


def _training(runs: list[Run]) -> str:
  """Returns what each run did, how it went and how to make it again."""
  articles = "".join(
    f"<article>\n<h3>{escape(run.kind)} <span>{escape(str(run.path))}</span></h3>\n"
    f'<dl class="facts">\n{_facts(run)}</dl>\n{_charts(run.metrics)}{_strip(run.path)}'
    f"{run.command and f'<pre>{escape(run.command)}</pre>'}\n"
    "<details><summary>Configuration</summary>"
    f"<pre>{escape(json.dumps(run.config, indent=2))}</pre></details>\n</article>\n"
    for run in runs
  )
  return f"<h2>Training</h2>\n{articles}"


def _facts(run: Run) -> str:
  facts = {"network": run.config["model"]["name"], "data": run.config["data"]["name"]}
  facts["batch"] = str(run.config["train"]["batch_size"])
  known = {key: value for key, value in run.training.items() if value is not None}
  facts |= {label: form(known[key]) for label, key, form in FACTS if key in known}
  pairs = ((label, escape(value)) for label, value in facts.items())
  return "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>\n" for k, v in pairs)


def _charts(metrics: list[dict]) -> str:
  """Returns a chart of the loss and one of the norms, each for light and dark."""
  pictures = ""
  for names in (("loss",), ("gradient_norm", "tangent_norm")):
    curves = {}
    for name in names:
      points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
      curves |= {name.replace("_", " "): np.array(points).T} if points else {}
    if curves:
      light, dark = (
        html.uri(_chart(curves, look), "svg+xml") for look in (LIGHT, DARK)
      )
      pictures += (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_list(curves)} by step"></picture>\n'
      )
  return _tiles("26rem", pictures)


def _chart(curves: dict[str, np.ndarray], look: tuple) -> bytes:
  """Draws name -> [2, N] of steps and values as an SVG."""
  from matplotlib.figure import Figure  # slow to import
  from matplotlib.ticker import EngFormatter

  ink, line, colours = look
  figure = Figure(figsize=(5.6, 3), layout="constrained")
  axes = figure.subplots(subplot_kw={"frameon": False})
  for (name, (steps, values)), colour in zip(curves.items(), colours, strict=False):
    axes.plot(steps, values, color=colour, linewidth=1.3, label=name)
  values = np.concatenate([curve[1] for curve in curves.values()])
  if values.min() > 0 and values.max() > 10 * values.min():
    axes.set_yscale("log")
  axes.xaxis.set_major_formatter(EngFormatter(sep=""))
  axes.set_xlabel("step", color=ink)
  axes.tick_params(which="both", colors=ink, length=0)
  axes.grid(color=line, linewidth=0.7)
  figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=ink)
  figure.savefig(buffer := io.BytesIO(), format="svg", transparent=True)
  return buffer.getvalue()


def _strip(run: pathlib.Path) -> str:
  """Returns a few of the training-time grids, from the first to the last."""
  paths = sorted((run / "samples").glob("*_*.png"))
  chosen = np.linspace(0, len(paths) - 1, min(len(paths), STRIP)).round().astype(int)
  figures = ""
  for path in (paths[k] for k in chosen):
    name, _, step = path.stem.rpartition("_")
    figures += _figure(path, escape(f"{name}, step {step.lstrip('0') or '0'}"))
  return _tiles("8rem", figures)


def _tiles(width: str, content: str) -> str:
  return content and f'<div class="tiles" style="--tile: {width}">\n{content}</div>\n'


def _figure(path: pathlib.Path, caption: str) -> str:
  """Returns a picture under a caption that is HTML; nothing if it is missing."""
  if not path.exists():
    return ""
  uri = html.uri(path.read_bytes(), path.suffix[1:])
  image = f'<img src="{uri}" alt="{escape(path.stem)}">'
  return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"


def _list(words: Iterable[str]) -> str:
  """Joins the distinct words as a sentence does: a, b and c."""
  *others, last = dict.fromkeys(words)
  return f"{', '.join(others)} and {last}" if others else last
