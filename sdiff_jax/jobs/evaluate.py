"""Job `evaluate`: measures the samples of several samplers, or given images."""

import dataclasses
import os
import time
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np
import tqdm

from sdiff_jax import config as config_lib
from sdiff_jax import losses, registry
from sdiff_jax.data import folder, npz
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import evaluation, pipelines, sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.io import file_io, image_io
from sdiff_jax.metrics.statistics import baselines, streaming
from sdiff_jax.reports import runs
from sdiff_jax.samplers import Sampler, SamplingStats
from sdiff_jax.types import Json, Params, UserError

# Names in results.json of fields of SamplingStats.
STORED_STATS = {"passes": "num_iterations", "evaluations": "num_evaluations"}
ALONE = 16  # images that are timed one by one


DEFAULTS = {
  "evaluate": {
    "samplers": ("heun/16",),  # name/steps
    "folder": "evaluate",  # in the work directory, for the results
    "num": config_lib.positive(5000),  # samples of each sampler
    "batch_size": config_lib.positive(512),  # over all devices
    "images": "",  # measure this .npz or folder of images instead of samples
    # The classifier of a data set (digits, fashion, or a path to an .npz), or pretrained
    # networks: inception:PATH for FID (pytorch-fid:PATH resizes as that package does),
    # dinov2:PATH for FD-DINOv2; several separated by commas.
    "features": "digits",
    # Folder of a CLIP model: adds the CLIP score of images of the job `generate`.
    "clip": "",
    # Statistics to compare with instead of images: .npz of ADM, EDM or the job
    # `statistics`, .pkl of EDM2.
    "reference": "",
    "pr_num_images": config_lib.not_negative(
      10_000
    ),  # for precision and recall; 0: none
    "latency": False,  # also time images one by one
    "baselines": False,  # also measure real halves and a Gaussian for each class
  }
}


@registry.register(
  "jobs",
  "evaluate",
  defaults=DEFAULTS,
  runtime=("evaluate",),
  configs_of=("train", "generate"),
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes results.json and a grid of samples of each sampler into evaluate.folder.

  With evaluate.images, or in a work directory of the job `generate`, it measures only
  these images, and writes images.json. The keys of a row are those of reports/runs.py.
  """
  images = config.evaluate.images
  if config.job == "generate":
    images = images or os.path.join(workdir, "images")
  folder = os.path.join(workdir, evaluation.results_folder(config))
  os.makedirs(folder, exist_ok=True)
  if images:
    name, rows = "images.json", [_given(config, images)]
  else:
    name, rows = "results.json", _trained(config, workdir, folder)
  path = os.path.join(folder, name)
  if jax.process_index() == 0:
    file_io.write_json(path, rows)
    print(runs.table(rows))
  return f"measured {len(rows)} rows: {path}"


def _given(config: ml_collections.ConfigDict, path: str) -> dict[str, Json]:
  """Returns the row of images, an .npz or a folder."""
  mesh, chosen = experiments.mesh(config), config.evaluate
  if not chosen.features and not chosen.clip:
    raise UserError(
      "config.evaluate: nothing to measure; give features=inception:PATH or clip=DIR"
    )
  real = evaluation.real(config) if chosen.features else None
  if path.endswith(".npz"):
    source = npz.build(path=path)
  else:
    side, channels = (*real.shape[1:],) if real else (folder.side(path), 3)
    source = folder.build(dir=path, image_size=side, channels=channels)
  prompts = evaluation.prompts_of(path) if chosen.clip else None
  meter = evaluation.metric_fn(config, mesh, real, source.shape, prompts)
  measured = meter([evaluation.dataset_images(source)], source.size)
  return _row(os.path.basename(path), "given images", measured, source.size)


def _trained(
  config: ml_collections.ConfigDict, workdir: str, folder: str
) -> list[dict[str, Json]]:
  """Returns the rows of a trained work directory, and writes their grids."""
  experiment, params = workdir_lib.trained(config, workdir)
  samplers = [(s, sampling.build_sampler(config, s)) for s in config.evaluate.samplers]
  stored = workdir_lib.read(workdir)
  config = config.copy_and_resolve_references()
  config.data = stored.data
  real, shape = evaluation.real(config), experiment.dataset.shape
  meter = evaluation.metric_fn(config, experiment.mesh, real, shape)
  rows = _baselines(config, experiment, meter) if config.evaluate.baselines else []
  facts = losses.facts(stored.loss)
  model, diffusion = facts.title, facts.family == "diffusion"
  share = _compute(workdir, config)
  scale = config.sample.guidance
  guided = "" if scale == 1 else f", guidance {scale:g}"
  with tqdm.tqdm(samplers, unit="sampler", desc="evaluate", disable=None) as bar:
    for i, (name, chosen) in enumerate(bar):
      measured, images = _sample(config, experiment, chosen, params, meter)
      grid = name.replace("/", "-") + ".png"
      _, columns = sampling.grid_size(experiment)
      if jax.process_index() == 0:
        picture = image_io.grid(images, columns)
        image_io.save_png(os.path.join(folder, grid), picture)
      row = _row(model, name + guided, measured, config.evaluate.num)
      row |= {"compute": share, "grid": grid}
      # The other solvers of a diffusion model are baselines of its students.
      if diffusion and i > 0:
        row["kind"] = "baseline"
      rows.append(row)
  return rows


def _row(model: str, sampler: str, measured: dict, num: int) -> dict[str, Json]:
  empty = dict.fromkeys(("evaluations", "images_per_second", "compute", "grid"))
  row = {"model": model, "sampler": sampler, "kind": "model", "images": num}
  return row | empty | measured


def _baselines(
  config: ml_collections.ConfigDict,
  experiment: experiments.Experiment,
  meter: evaluation.MetricFn,
) -> list[dict]:
  """Returns the rows of training images and of a Gaussian for each class.

  Where the reference is the training images, one half of them is compared with the
  other instead.
  """
  source = experiment.dataset
  experiments.check_images(source)
  num = config.evaluate.num
  images, cond = source[np.arange(source.size)]
  order = np.random.default_rng(0).permutation(len(images))
  if config.reference.name or config.evaluate.reference:
    name, some, against = "training images", order[:num], meter
  else:
    some, other = np.array_split(order, 2)
    rest = dataclasses.replace(source, read=lambda k: source[other[k]], size=len(other))
    against = evaluation.metric_fn(config, experiment.mesh, rest, source.shape)
    name = "one half to the other"
  drawn = baselines.class_gaussian(images, source.class_of(cond, source.size), num)
  real, gaussian = (
    measure([evaluation.array_images(x)], len(x))
    for measure, x in ((against, images[some]), (meter, drawn))
  )
  rows = [
    _row("real data", name, real, len(some)),
    _row("Gaussian per class", "full covariance", gaussian, num),
  ]
  return [row | {"kind": "baseline"} for row in rows]


def _sample(
  config: ml_collections.ConfigDict,
  experiment: experiments.Experiment,
  chosen: Sampler,
  params: Params,
  meter: evaluation.MetricFn,
) -> tuple[dict[str, float], np.ndarray]:
  """Returns measures of evaluate.num images and what they took, and the first of them.

  The time is that of the sampler alone, without compilation. Images are measured batch
  by batch and dropped.
  """
  num, batch_size = (config.evaluate[k] for k in ("num", "batch_size"))
  first, results, seconds = [], [], []
  shown, _ = sampling.grid_size(experiment)

  def batches() -> Iterator[streaming.Images]:
    for images, result, took in _timed(
      config, experiment, chosen, params, num, batch_size
    ):
      seconds.append(took)
      results.append(result)
      first.extend(images[: max(shown - len(first), 0)])
      yield evaluation.array_images(images)

  measured = meter(batches(), num)
  measured["images_per_second"] = num / sum(seconds)
  for name, stat in STORED_STATS.items():
    values = np.concatenate([getattr(stats, stat) for stats in results])
    measured[name] = float(values.mean())
  if config.evaluate.latency:
    mesh = experiment.mesh
    each = mesh.size // mesh.shape["window"]  # an image on every device that has some
    timed = _timed(config, experiment, chosen, params, ALONE * each, each)
    measured["latency"] = float(np.median([took for _, _, took in timed]))
  return measured, np.stack(first)


def _timed(
  config: ml_collections.ConfigDict,
  experiment: experiments.Experiment,
  chosen: Sampler,
  params: Params,
  num: int,
  batch_size: int,
) -> Iterator[tuple[np.ndarray, SamplingStats, float]]:
  """Yields images, what they took, and the seconds, batch by batch, once compiled."""
  field = "evaluate.batch_size"
  pipeline = sampling.pipeline(config, experiment)
  shape = (batch_size, *pipeline.shape)
  chosen = pipelines.with_window(
    pipeline.mesh, chosen, pipeline.placeholder, params, shape
  )
  sampler = pipelines.batch_sampler(pipeline, chosen)
  next(pipelines.batches(pipeline, sampler, params, num, batch_size, field))
  batches = pipelines.batches(pipeline, sampler, params, num, batch_size, field)
  begin = time.perf_counter()
  for images, stats in batches:
    yield images, stats, time.perf_counter() - begin
    begin = time.perf_counter()


def _compute(workdir: str, config: ml_collections.ConfigDict) -> float | None:
  """Returns the run's training operations so far as a fraction of its teacher's."""
  teacher = workdir_lib.parent(workdir_lib.read(workdir)) or workdir
  paths = [os.path.join(d, "training.json") for d in (workdir, teacher)]
  if not all(map(os.path.exists, paths)):
    return None
  mine, theirs = map(file_io.read_json, paths)
  part = (config.sample.checkpoint or mine["steps"]) / mine["steps"]
  return part * mine["flops"] / theirs["flops"]
