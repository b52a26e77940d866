"""Job `evaluate`: samples with several solvers and measures each against the data."""

import json
import os
import time
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm

from sdiff_jax import report, writer
from sdiff_jax.interfaces import Params, UserError
from sdiff_jax.jobs import experiment as experiments
from sdiff_jax.metrics import baselines, frechet, precision_recall
from sdiff_jax.metrics.features import classifier
from sdiff_jax.samplers.tables import Table


def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes evaluate/results.json and a grid of samples for each solver.

  Distances are to all images of the data set; see report.py for what a row holds.
  """
  experiment, params = experiments.trained(config, workdir)
  samplers = [(s, experiments.table(config, s)) for s in config.evaluate.samplers]
  measure = _measure(experiment)
  folder = os.path.join(workdir, "evaluate")
  os.makedirs(folder, exist_ok=True)
  rows = _baselines(experiment, measure) if config.evaluate.baselines else []
  model, share = experiments.title(experiment.config), _compute(workdir)
  scale = config.sample.guidance
  guided = "" if scale == 1 else f", guidance {scale:g}"
  with tqdm.tqdm(samplers, unit="sampler", desc="evaluate", disable=None) as bar:
    for i, (name, solver) in enumerate(bar):
      images, rate = _sample(experiment, solver, params)
      grid = name.replace("/", "-") + ".png"
      num, columns = experiments.grid_size(experiment)
      writer.save_png(os.path.join(folder, grid), writer.grid(images[:num], columns))
      row = _row(model, name + guided, measure(images), len(images)) | {
        "evaluations": solver.evaluations,
        "images_per_second": rate,
        "compute": share,
        "grid": grid,
      }
      # A teacher's other solvers are what its students have to beat.
      if model == "teacher" and i > 0:
        row["kind"] = "baseline"
      rows.append(row)
  if jax.process_index() == 0:
    with open(os.path.join(folder, "results.json"), "w", encoding="utf-8") as file:
      json.dump(rows, file, indent=2)
  print(report.table(rows))
  return f"measured {len(rows)} rows: {os.path.join(folder, 'results.json')}"


def _row(model: str, sampler: str, measured: dict, num: int) -> dict[str, Any]:
  empty = dict.fromkeys(("evaluations", "images_per_second", "compute", "grid"))
  row = {"model": model, "sampler": sampler, "kind": "model", "images": num}
  return row | measured | empty


def _measure(experiment: experiments.Experiment) -> Any:
  """Returns images uint8 -> distance, precision and recall against the data set."""
  extract = classifier.load(experiment.config.evaluate.features)
  try:
    real = extract(_real(experiment)[0])
  except ValueError as error:
    raise UserError(f"config.evaluate.features: {error}") from error
  statistics = frechet.statistics(real)

  def measure(images: np.ndarray) -> dict[str, float]:
    fake = extract(images)
    distance = frechet.distance(frechet.statistics(fake), statistics)
    precision, recall = precision_recall.precision_recall(real, fake)
    return {"frechet": distance, "precision": precision, "recall": recall}

  return measure


def _real(experiment: experiments.Experiment) -> tuple[np.ndarray, np.ndarray]:
  return experiment.source.take(np.arange(experiment.source.size))


def _baselines(experiment: experiments.Experiment, measure: Any) -> list[dict]:
  """Returns the rows of the data's own halves and of a Gaussian for each class."""
  images, labels = _real(experiment)
  order = np.random.default_rng(0).permutation(len(images))
  halves = np.array_split(order, 2)
  extract = classifier.load(experiment.config.evaluate.features)
  a, b = (extract(images[half]) for half in halves)
  precision, recall = precision_recall.precision_recall(a, b)
  distance = frechet.distance(frechet.statistics(a), frechet.statistics(b))
  split = {"frechet": distance, "precision": precision, "recall": recall}
  num = experiment.config.evaluate.num
  gaussian = measure(baselines.class_gaussian(images, labels, num))
  rows = [
    _row("real data", "one half to the other", split, len(halves[0])),
    _row("Gaussian per class", "full covariance", gaussian, num),
  ]
  return [row | {"kind": "baseline"} for row in rows]


def _sample(
  experiment: experiments.Experiment, solver: Table, params: Params
) -> tuple[np.ndarray, float]:
  """Returns evaluate.num images and the images a second, without compilation."""
  chosen = experiment.config.evaluate
  call = experiments.sampler(experiment, solver)
  settings = {"num": chosen.num, "batch_size": chosen.batch_size}
  settings["field"] = "evaluate.batch_size"
  next(experiments.generate(experiment, call, params, **settings))
  begin = time.perf_counter()
  made = list(experiments.generate(experiment, call, params, **settings))
  rate = chosen.num / (time.perf_counter() - begin)
  return np.concatenate([images for images, _ in made]), rate


def _compute(workdir: str) -> float | None:
  """Returns this run's training operations as a share of its teacher's."""
  config = experiments.read(workdir)
  teacher = config.teacher.workdir or workdir
  paths = [os.path.join(d, "training.json") for d in (workdir, teacher)]
  if not all(map(os.path.exists, paths)):
    return None
  mine, theirs = (_flops(path) for path in paths)
  return mine / theirs


def _flops(path: str) -> float:
  with open(path, encoding="utf-8") as file:
    return json.load(file)["flops"]
