"""Job `evaluate`: measures samples of several solvers, or given images."""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm

from sdiff_jax import lookup, report, writer
from sdiff_jax.data import folder, npz, pipeline
from sdiff_jax.interfaces import Params, UserError
from sdiff_jax.jobs import experiment as experiments
from sdiff_jax.jobs import sampling
from sdiff_jax.metrics import baselines, reference
from sdiff_jax.metrics.features import classifier
from sdiff_jax.samplers.plans import Plan

CHUNK = 1000  # images decoded at a time
# Images -> distance, precision and recall.
Measure = Callable[[np.ndarray], dict[str, float]]


def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes evaluate/results.json and a grid of samples for each solver.

  Those of sample.checkpoint go to evaluate_STEP. With evaluate.images it measures
  those alone, into evaluate/images.json. See report.py for what a row holds.
  """
  step = config.sample.checkpoint
  folder = os.path.join(workdir, f"evaluate_{step}" if step else "evaluate")
  os.makedirs(folder, exist_ok=True)
  if config.evaluate.images:
    name, rows = "images.json", [_given(config)]
  else:
    name, rows = "results.json", _trained(config, workdir, folder)
  path = os.path.join(folder, name)
  if jax.process_index() == 0:
    with open(path, "w", encoding="utf-8") as file:
      json.dump(rows, file, indent=2)
    print(report.table(rows))
  return f"measured {len(rows)} rows: {path}"


def _given(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the row of the images in evaluate.images."""
  path = config.evaluate.images
  real = _reference(config)
  if path.endswith(".npz"):
    source = npz.build(path=path)
  else:
    source = folder.build(dir=path, image_size=real.shape[0], channels=real.shape[2])
  measured = _measure(config, real)(_all(source))
  return _row(os.path.basename(path), "given images", measured, source.size)


def _trained(
  config: ml_collections.ConfigDict, workdir: str, folder: str
) -> list[dict[str, Any]]:
  """Returns the rows of a trained work directory, and writes their grids."""
  experiment, params = experiments.trained(config, workdir)
  samplers = [(s, sampling.plan(config, s)) for s in config.evaluate.samplers]
  real = _reference(experiment.config)
  measure = _measure(experiment.config, real)
  rows = _baselines(experiment, real, measure) if config.evaluate.baselines else []
  model, share = experiments.title(experiment.config), _compute(workdir, config)
  scale = config.sample.guidance
  guided = "" if scale == 1 else f", guidance {scale:g}"
  with tqdm.tqdm(samplers, unit="sampler", desc="evaluate", disable=None) as bar:
    for i, (name, chosen) in enumerate(bar):
      images, took = _sample(experiment, chosen, params)
      grid = name.replace("/", "-") + ".png"
      num, columns = sampling.grid_size(experiment)
      if jax.process_index() == 0:
        picture = writer.grid(images[:num], columns)
        writer.save_png(os.path.join(folder, grid), picture)
      row = _row(model, name + guided, measure(images), len(images))
      row |= took | {"compute": share, "grid": grid}
      # A teacher's other solvers are what its students have to beat.
      if model == "teacher" and i > 0:
        row["kind"] = "baseline"
      rows.append(row)
  return rows


def _row(model: str, sampler: str, measured: dict, num: int) -> dict[str, Any]:
  empty = dict.fromkeys(("evaluations", "images_per_second", "compute", "grid"))
  row = {"model": model, "sampler": sampler, "kind": "model", "images": num}
  return row | measured | empty


def _reference(config: ml_collections.ConfigDict) -> pipeline.Source:
  section = config.reference if config.reference.name else config.data
  source = lookup.build("data", section.to_dict())
  pipeline.check_pixels(source)
  return source


def _measure(config: ml_collections.ConfigDict, real: pipeline.Source) -> Measure:
  """Returns the measure against a source; its statistics are kept between runs."""
  extract = classifier.load(config.evaluate.features)

  def features(images: np.ndarray) -> np.ndarray:
    try:
      return extract(images)
    except ValueError as error:
      raise UserError(f"config.evaluate.features: {error}") from error

  # Data and features are told apart by a few images and what is made of them.
  probe = real.take(np.linspace(0, real.size - 1, 64).astype(int))[0]
  key = (str((real.size, real.shape)).encode(), probe.tobytes())
  known = reference.cached(
    (*key, features(probe).tobytes()), lambda: reference.of(features(_all(real)))
  )
  return lambda images: reference.measure(features(images), known)


def _all(source: pipeline.Source) -> np.ndarray:
  """Returns all images of a source."""
  starts = range(0, source.size, CHUNK)
  bar = tqdm.tqdm(starts, desc="read images", disable=None, leave=False)
  chunks = (np.arange(i, min(i + CHUNK, source.size)) for i in bar)
  return np.concatenate([source.take(chosen)[0] for chosen in chunks])


def _baselines(
  experiment: experiments.Experiment, real: pipeline.Source, measure: Measure
) -> list[dict]:
  """Returns the rows of training images and of a Gaussian for each class.

  Where the reference is the training images, one half of them is compared with the
  other instead.
  """
  num, config = experiment.config.evaluate.num, experiment.config
  images, cond = experiment.source.take(np.arange(experiment.source.size))
  order = np.random.default_rng(0).permutation(len(images))
  if config.reference.name:
    name, some, against = "training images", order[:num], measure
  else:
    some, other = np.array_split(order, 2)
    name, against = "one half to the other", _measure_halves(config, images[other])
  gaussian = measure(baselines.class_gaussian(images, cond["label"], num))
  rows = [
    _row("real data", name, against(images[some]), len(some)),
    _row("Gaussian per class", "full covariance", gaussian, num),
  ]
  return [row | {"kind": "baseline"} for row in rows]


def _measure_halves(config: ml_collections.ConfigDict, other: np.ndarray) -> Measure:
  extract = classifier.load(config.evaluate.features)
  known = reference.of(extract(other))
  return lambda images: reference.measure(extract(images), known)


def _sample(
  experiment: experiments.Experiment, chosen: Plan, params: Params
) -> tuple[np.ndarray, dict[str, float]]:
  """Returns evaluate.num images, and what they took, without compilation."""
  settings = {
    "num": experiment.config.evaluate.num,
    "batch_size": experiment.config.evaluate.batch_size,
    "field": "evaluate.batch_size",
  }
  chosen = sampling.with_window(experiment, chosen, params, settings["batch_size"])
  call = sampling.sampler(experiment, chosen)
  next(sampling.generate(experiment, call, params, **settings))
  begin = time.perf_counter()
  made = list(sampling.generate(experiment, call, params, **settings))
  rate = settings["num"] / (time.perf_counter() - begin)
  passes, evaluations = (
    float(np.concatenate([getattr(result, name) for _, _, result in made]).mean())
    for name in ("passes", "evaluations")
  )
  took = {"passes": passes, "evaluations": evaluations, "images_per_second": rate}
  return np.concatenate([images for images, _, _ in made]), took


def _compute(workdir: str, config: ml_collections.ConfigDict) -> float | None:
  """Returns the run's training operations so far as a share of its teacher's."""
  teacher = experiments.read(workdir).teacher.workdir or workdir
  paths = [os.path.join(d, "training.json") for d in (workdir, teacher)]
  if not all(map(os.path.exists, paths)):
    return None
  mine, theirs = map(_read, paths)
  part = (config.sample.checkpoint or mine["steps"]) / mine["steps"]
  return part * mine["flops"] / theirs["flops"]


def _read(path: str) -> dict[str, float]:
  with open(path, encoding="utf-8") as file:
    return json.load(file)
