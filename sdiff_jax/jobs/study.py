"""Job `study`: trains and measures all runs of a study, and draws what came of it.

A study is a config with runs (see `runs` below): each is an experiment's config file
with some fields changed. What is there already is not made again, so a study that was
stopped goes on with the same command.
"""

import ast
import json
import os
import sys
from collections.abc import Callable
from html import escape
from typing import Any

import jax
import ml_collections

from sdiff_jax import config as config_lib
from sdiff_jax import losses, registry
from sdiff_jax.experiment import probes
from sdiff_jax.io import file_io
from sdiff_jax.jobs import evaluate, train
from sdiff_jax.reports import html, studies
from sdiff_jax.training import metric_writer
from sdiff_jax.types import UserError

DEFAULTS = {"study": {"name": "", "runs": ()}}  # filled by the files of configs/studies


@registry.register(
  "jobs", "study", defaults=DEFAULTS, runtime=("study",), creates_workdir=True
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes NAME.html, NAME.png, NAME.svg and NAME.json; runs lie in seedK/RUN.

  Studies may share a work directory, and with it the runs that they have in common.

  Raises:
    UserError: the config is no study's, or a run of it refuses its fields.
  """
  study = config.study.to_dict()
  if not study["runs"]:
    raise UserError("config.study.runs is empty: name a file of configs/studies/")
  study["runs"] = {entry["name"]: entry for entry in study["runs"]}  # in this order
  pairs = [(seed, name) for seed in study["seeds"] for name in study["runs"]]
  prepared = {p: config_of(study, workdir, *p) for p in pairs}  # mistakes before work
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


def config_of(
  study: dict[str, Any], workdir: str, seed: int, name: str
) -> ml_collections.ConfigDict:
  """Returns the config of a run."""
  entry = study["runs"][name]
  file = entry["config"]
  missing = f"config.study.runs: no file {file.partition(':')[0]} in {os.getcwd()}"
  loaded = config_lib.load(file, missing)
  loaded.seed = seed
  if entry["teacher"]:
    loaded.teacher.workdir = _folder(workdir, seed, entry["teacher"])
    loaded.init_from = loaded.teacher.workdir
  for change in (*study["set"], *entry["set"]):
    assign(loaded, change)
  if not losses.facts(loaded.loss).needs_teacher:
    loaded.teacher.workdir = ""
  config_lib.validate(loaded)
  return loaded


def assign(config: ml_collections.ConfigDict, change: str) -> None:
  """Changes a field of a config by "section.field=value".

  "section=name" takes another piece, which keeps the fields that both have.

  Raises:
    UserError: there is no such field, or it has another type.
  """
  field, _, text = change.partition("=")
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if field in config_lib.PIECES:
    piece = config_lib.component(config_lib.PIECES[field], value)
    old = config[field].to_dict()
    piece.update({k: old[k] for k in piece if k in old and k != "name"})
    config[field] = piece
    return
  *sections, last = field.split(".")
  try:
    for name in sections:
      config = config[name]
    config.update({last: value if last in config else config[last]})
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(f"config.study: {change}: {error}") from error


def _points(
  study: dict[str, Any],
  workdir: str,
  seed: int,
  name: str,
  config: ml_collections.ConfigDict,
  earlier: list[dict[str, Any]],
) -> list[dict[str, Any]]:
  """Returns the points of a run, which is trained and measured where it is not."""
  entry = study["runs"][name]
  weights = _folder(workdir, seed, entry["weights"] or name)
  if not entry["weights"] and not os.path.exists(f"{weights}/training.json"):
    _say(train.run(config, weights))
    jax.clear_caches()
    if not os.path.exists(f"{weights}/training.json"):
      raise UserError("stopped; the same command goes on")
  if not entry["drawn"]:
    return []
  known = {"seed": seed, "run": name, "guidance": entry["guidance"]}
  named = known | {"series": entry["series"] or name}
  if study["source"] == "log":
    return [named | row for row in metric_writer.read_metrics(weights)]
  if study["source"] == "parallel":
    path = os.path.join(weights, f"parallel-{name}.json")
    found = _kept(path, probes.parallel_sampling, config, weights)
    return [named | row for row in found]
  with open(os.path.join(weights, "training.json"), encoding="utf-8") as file:
    known["flops"] = json.load(file)["flops"]
  rows = []
  of = entry["teacher"] or entry["weights"] or name
  for step in _steps(weights) if entry["checkpoints"] else [0]:
    at = _at(config, name, step)
    more = {"step": step or config.train.steps}
    if study["source"] == "tangent" and entry["teacher"]:
      path = os.path.join(weights, evaluate.folder_of(at), "tangent.json")
      more |= _kept(path, probes.tangent_terms, at, weights)
    for row in _measured(at, weights):
      row = known | row | more
      row["series"] = entry["series"] or f"{name}, {row['sampler']}"
      if row["images_per_second"]:
        row["seconds"] = 1 / row["images_per_second"]
      rows.append(row)
      theirs = _first([*earlier, *rows], seed, of)
      if theirs:
        row["ratio"] = row["frechet"] / theirs["frechet"]
  return rows


def _first(rows: list[dict[str, Any]], seed: int, name: str) -> dict[str, Any] | None:
  """Returns the first row of a run."""
  return next((r for r in rows if r["seed"] == seed and r["run"] == name), None)


def _kept(
  path: str,
  measure: Callable[[ml_collections.ConfigDict, str], Any],
  config: ml_collections.ConfigDict,
  workdir: str,
) -> Any:
  """Returns what a file holds; before there is one, what is measured, and writes it."""
  if os.path.exists(path):
    with open(path, encoding="utf-8") as file:
      return json.load(file)
  found = measure(config, workdir)
  jax.clear_caches()
  if jax.process_index() == 0:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file_io.write_text(path, json.dumps(found, indent=1))
  return found


def _at(
  config: ml_collections.ConfigDict, name: str, step: int
) -> ml_collections.ConfigDict:
  """Returns the config that a run's checkpoint is measured with."""
  config = config.copy_and_resolve_references()
  config.sample.checkpoint = step
  config.evaluate.folder = f"evaluate-{name}"
  return config


def _steps(workdir: str) -> list[int]:
  """Returns the steps of the checkpoints before the last, and 0 for that one."""
  found = os.listdir(os.path.join(workdir, "checkpoints"))
  return [*sorted(int(f) for f in found if f.isdigit())[:-1], 0]


def _measured(config: ml_collections.ConfigDict, workdir: str) -> list[dict[str, Any]]:
  """Returns the rows of the job evaluate, from its file if they are there."""
  path = os.path.join(workdir, evaluate.folder_of(config), "results.json")
  if not os.path.exists(path):
    _say(evaluate.run(config, workdir))
    jax.clear_caches()
  with open(path, encoding="utf-8") as file:
    return [row for row in json.load(file) if row["evaluations"]]


def _write(study: dict[str, Any], workdir: str, rows: list[dict[str, Any]]) -> None:
  """Writes what a study found."""
  x, panels = study["x"], tuple(study["panels"])
  path = os.path.join(workdir, study["name"])
  figure = studies.draw(rows, x, panels, study["log"])
  drawn = {kind: studies.picture(figure, kind) for kind in ("png", "svg")}
  for kind, content in drawn.items():
    with open(f"{path}.{kind}", "wb") as file:
      file.write(content)
  file_io.write_text(f"{path}.json", json.dumps(rows, indent=1))
  tables = studies.tables(rows, x, panels)
  for lines in tables:
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
  uri = html.uri(drawn["svg"], "svg+xml")
  body = f'<img src="{uri}" alt="{escape(study["title"])}">\n'
  body += "".join(html.table(head, lines) for head, *lines in tables)
  runs = json.dumps({"seeds": study["seeds"], **study["runs"]}, indent=2)
  body += f"<h2>Runs</h2>\n<pre>{escape(runs)}</pre>"
  text = html.TEMPLATE.substitute(
    title=escape(study["title"]), lead=escape(study["lead"]), body=body
  )
  file_io.write_text(f"{path}.html", text)
