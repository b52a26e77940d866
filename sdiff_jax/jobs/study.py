"""Job `study`: trains and evaluates all runs of a study, and plots the results.

A study is a config with a list of runs (see experiment/studies.py). Each run is the
config file of an experiment with some fields changed. Runs and results that exist are
reused, so an interrupted study resumes when the command is repeated.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from html import escape

import jax
import ml_collections

from sdiff_jax import config as config_lib
from sdiff_jax import losses, registry
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import evaluation, probes, studies, training
from sdiff_jax.io import file_io, lock, records, storage
from sdiff_jax.reports import html, results
from sdiff_jax.reports import studies as figures
from sdiff_jax.training import checkpoints, metric_writer, summary
from sdiff_jax.types import Json, UserError

Numbers = dict[str, float | None]  # result of a measurement
Rows = list[Numbers]


@registry.register(
  "jobs",
  "study",
  sections={"study": studies.Study},
  runtime=("study",),
  creates_workdir=True,
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes NAME.html, NAME.png, NAME.svg and NAME.json; runs are stored in seedK/RUN.

  Studies that share a work directory share the runs that they have in common.

  Raises:
    UserError: the config is not that of a study, or a run refuses its fields.
  """
  study = config.study.to_dict()
  if not study["runs"]:
    raise UserError("config.study.runs is empty: use a file of configs/studies/")
  study["runs"] = {run["name"]: run for run in study["runs"]}  # in this order
  pairs = [(seed, name) for seed in study["seeds"] for name in study["runs"]]
  # All configs first, so that mistakes appear before any work is done.
  prepared = {pair: run_config(study, workdir, *pair) for pair in pairs}
  rows = []
  for k, (seed, name) in enumerate(pairs):
    _say(f"{k + 1} of {len(pairs)}: {name}, seed {seed}")
    rows += _points(study, workdir, seed, name, prepared[seed, name], rows)
  if jax.process_index() == 0:
    _write(study, workdir, rows)
  return f"study of {len(pairs)} runs: {os.path.join(workdir, study['name'] + '.html')}"


def _say(message: str) -> None:
  if jax.process_index() == 0:
    print(message, file=sys.stderr, flush=True)


def _folder(workdir: str, seed: int, name: str) -> str:
  return os.path.join(workdir, f"seed{seed}", name)


def run_config(
  study: dict[str, Json], workdir: str, seed: int, name: str
) -> ml_collections.ConfigDict:
  """Returns the config of a run."""
  entry = study["runs"][name]
  file = entry["config"]
  missing = f"config.study.runs: no file {file.partition(':')[0]} in {os.getcwd()}"
  loaded = config_lib.load(file, missing)
  loaded.seed = seed
  if entry["teacher"]:
    loaded.teacher.workdir = _folder(workdir, seed, entry["teacher"])
    loaded.init_from = _folder(workdir, seed, entry["start"] or entry["teacher"])
  for change in (*study["set"], *entry["set"]):
    studies.apply(loaded, change)
  if not losses.facts(loaded.loss).needs_teacher:
    loaded.teacher.workdir = ""
  config_lib.validate(loaded)
  return loaded


def _points(
  study: dict[str, Json],
  workdir: str,
  seed: int,
  name: str,
  config: ml_collections.ConfigDict,
  earlier: list[dict[str, Json]],
) -> list[dict[str, Json]]:
  """Trains and evaluates a run unless its results exist; returns its points.

  Args:
    study: the section config.study, with the runs by name.
    workdir: of the study.
    seed: of the run.
    name: of the run.
    config: of the run.
    earlier: points of the runs before.

  Returns:
    Points: key -> value; see reports/studies.py for the keys.
  """
  entry = study["runs"][name]
  weights = _folder(workdir, seed, entry["weights"] or name)
  if entry["budget"]:
    config = _budgeted(study, workdir, seed, name, config)
  if not entry["weights"] and not summary.exists(weights):
    _run_job("train", config, weights)
  if not entry["drawn"]:
    return []
  labels = {"seed": seed, "run": name}
  labels |= {key: entry[key] for key in ("guidance", "budget")}
  series = labels | {"series": entry["series"] or name}
  if study["source"] == "log":
    return [series | row for row in metric_writer.read_metrics(weights)]
  if study["source"] == "parallel":
    path = os.path.join(weights, f"parallel-{name}.json")
    rows = _cached(path, Rows, probes.parallel_sampling, config, weights)
    return [series | row for row in rows]
  labels["flops"] = (summary.read(weights) or {}).get("flops")
  points = []
  baseline = entry["teacher"] or entry["weights"] or name
  for step in _checkpoints(weights) if entry["checkpoints"] else [0]:
    at_step = _at_step(config, name, step)
    extra = {"step": step or config.train.steps}
    if study["source"] == "tangent" and entry["teacher"]:
      path = os.path.join(weights, evaluation.results_folder(at_step), "tangent.json")
      extra |= _cached(path, Numbers, probes.tangent_terms, at_step, weights)
    for row in _evaluate(at_step, weights):
      point = labels | row | extra
      if entry["start"]:
        point["compute"] = _compute(study, workdir, seed, name)
      point["series"] = entry["series"] or f"{name}, {row['sampler']}"
      if row.get("images_per_second"):
        point["seconds"] = 1 / row["images_per_second"]
      points.append(point)
      reference = _first([*earlier, *points], seed, baseline)
      if reference and reference.get("frechet") and point.get("frechet") is not None:
        point["ratio"] = point["frechet"] / reference["frechet"]
  return points


def _budgeted(
  study: dict[str, Json],
  workdir: str,
  seed: int,
  name: str,
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """Returns the config of a run with the number of steps that its budget allows.

  Raises:
    UserError: the runs before have used the budget.
  """
  entry, config = study["runs"][name], config.copy_and_resolve_references()
  finished = summary.read(_folder(workdir, seed, name))
  if finished:
    config.train.steps = finished["steps"]
    return config
  left = entry["budget"]
  if entry["start"]:
    left -= _compute(study, workdir, seed, entry["start"])
  whole = summary.read(_folder(workdir, seed, entry["teacher"]))["flops"]
  step = training.run_flops(config, experiments.build(config))
  config.train.steps = round(left * whole / step)
  if config.train.steps < 1:
    raise UserError(
      f"config.study.runs: budget={entry['budget']} of {name} leaves no step"
    )
  return config


def _compute(study: dict[str, Json], workdir: str, seed: int, name: str) -> float:
  """Returns the operations of a run and of those before it, of their teacher's."""
  entry, total = study["runs"][name], 0.0
  teacher = _folder(workdir, seed, entry["teacher"])
  while name:
    total += summary.flops_ratio(_folder(workdir, seed, name), teacher)
    name = study["runs"][name]["start"]
  return total


def _run_job(name: str, config: ml_collections.ConfigDict, workdir: str) -> None:
  first = jax.process_index() == 0
  with lock.locked(workdir, name) if first else contextlib.nullcontext():
    _say(registry.lookup("jobs", name).build(config, workdir))
  jax.clear_caches()


def _first(
  points: list[dict[str, Json]], seed: int, name: str
) -> dict[str, Json] | None:
  """Returns the first point of a run, None if it has none."""
  return next((p for p in points if p["seed"] == seed and p["run"] == name), None)


def _cached(
  path: str,
  schema: type,
  measure: Callable[[ml_collections.ConfigDict, str], Json],
  config: ml_collections.ConfigDict,
  workdir: str,
) -> Json:
  """Reads a JSON result, or computes `measure(config, workdir)` and stores it."""
  if storage.lexists(path):
    return records.read(path, schema, "remove it to measure again")
  result = measure(config, workdir)
  jax.clear_caches()
  if jax.process_index() == 0:
    file_io.write_json(path, result, indent=1)
  return result


def _at_step(
  config: ml_collections.ConfigDict, name: str, step: int
) -> ml_collections.ConfigDict:
  """Returns the config that evaluates a checkpoint of a run."""
  config = config.copy_and_resolve_references()
  config.sample.checkpoint = step
  config.evaluate.folder = f"evaluate-{name}"
  return config


def _checkpoints(workdir: str) -> list[int]:
  """Returns the steps of all checkpoints but the last, and 0 for the last."""
  return [*checkpoints.steps(workdir)[:-1], 0]


def _evaluate(config: ml_collections.ConfigDict, workdir: str) -> list[dict[str, Json]]:
  """Returns the rows of the job `evaluate`, which is run unless its file exists."""
  path = os.path.join(workdir, evaluation.results_folder(config), "results.json")
  if not storage.exists(path):
    _run_job("evaluate", config, workdir)
  return [row for row in results.read(path) if row.get("evaluations")]


def _write(study: dict[str, Json], workdir: str, rows: list[dict[str, Json]]) -> None:
  """Writes figure, tables and points of a study."""
  x, panels = study["x"], tuple(study["panels"])
  path = os.path.join(workdir, study["name"])
  figure = figures.draw(rows, x, panels, study["log"])
  pictures = {kind: figures.picture(figure, kind) for kind in ("png", "svg")}
  for kind, content in pictures.items():
    file_io.write_bytes(f"{path}.{kind}", content)
  file_io.write_json(f"{path}.json", rows, indent=1)
  tables = figures.tables(rows, x, (*panels, *study["columns"]))
  for lines in tables:
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
  uri = html.uri(pictures["svg"], "svg+xml")
  body = f'<img src="{uri}" alt="{escape(study["title"])}">\n'
  body += "".join(html.table(head, lines) for head, *lines in tables)
  runs = json.dumps({"seeds": study["seeds"], **study["runs"]}, indent=2)
  body += f"<h2>Runs</h2>\n<pre>{escape(runs)}</pre>"
  text = html.TEMPLATE.substitute(
    title=escape(study["title"]), lead=escape(study["lead"]), body=body
  )
  file_io.write_text(f"{path}.html", text)
