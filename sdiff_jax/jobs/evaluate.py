"""Job `evaluate`: computes metrics of the samples of several samplers, or of images."""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Mapping
from typing import Annotated

import jax
import ml_collections
import numpy as np

from sdiff_jax import fields, losses, registry
from sdiff_jax.data import folder as folder_lib
from sdiff_jax.data import image_shards, npz
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import evaluation, pipelines, prompts, sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.fields import Count, Index, Length, Range
from sdiff_jax.io import downloads, file_io, image_io, records, snapshot, storage
from sdiff_jax.io.progress import Progress
from sdiff_jax.metrics import precision_recall
from sdiff_jax.metrics.statistics import baselines, streaming
from sdiff_jax.reports import results
from sdiff_jax.samplers import Sampler, SamplingStats
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.training import summary
from sdiff_jax.types import Json, Params, UserError

# Names in results.json of fields of SamplingStats.
STORED_STATS = {"passes": "num_iterations", "evaluations": "num_evaluations"}
# State of the measurement that an interrupted job resumes from, in evaluate.folder.
PARTIAL = "partial.npz"
LATENCY_IMAGES = 16  # that each device samples one by one for the latency


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
  """What is evaluated, and against which images.

  Attributes:
    samplers: samplers and their numbers of steps, name/steps.
    folder: folder of the results, in the work directory.
    num: samples of each sampler.
    batch_size: samples of a batch, over all devices.
    images: an .npz, a folder of images, or the folder samples.parts of a large job
      `sample` to evaluate instead of samples.
    features: the classifier of a data set (digits, fashion, or a path to an .npz), or
      pretrained networks: inception:PATH for FID (pytorch-fid:PATH resizes as that
      package does), dinov2:PATH for FD-DINOv2; several separated by commas.
    clip: folder of a CLIP model: adds the CLIP score of samples of sample.prompts, and of
      images of the job `generate`.
    reference: statistics to compare with instead of images: .npz of ADM, EDM or the job
      `statistics`, .pkl of EDM2.
    pr_num_images: images whose features are kept for precision and recall; 0 computes
      neither.
    latency: whether the sampling of one image is timed as well.
    baselines: whether real images and samples of a Gaussian fitted to each class are
      evaluated as well.
  """

  samplers: Annotated[tuple[str, ...], Length(0, 1000)] = ("heun/16",)
  folder: str = "evaluate"
  num: Annotated[int, Range(2)] = 5000
  batch_size: Count = 512
  images: fields.Path = ""
  features: str = "digits"
  clip: fields.Path = ""
  reference: fields.Path = ""
  pr_num_images: Index = 10_000
  latency: bool = False
  baselines: bool = False

  def __post_init__(self) -> None:
    parts = os.path.normpath(self.folder).split(os.sep)
    if os.path.isabs(self.folder) or {".", ".."} & {*parts} or "\0" in self.folder:
      raise ValueError(
        f"folder={fields.quote(self.folder)}: must be a folder inside the work directory"
      )
    if 0 < self.pr_num_images <= precision_recall.NEIGHBOR:
      raise ValueError(
        f"pr_num_images={self.pr_num_images}: must be 0 or above "
        f"{precision_recall.NEIGHBOR}"
      )
    if self.pr_num_images and self.num <= precision_recall.NEIGHBOR:
      raise ValueError(
        f"num={self.num}: must be above {precision_recall.NEIGHBOR} for precision and "
        "recall; pr_num_images=0 leaves them out"
      )
    if not (self.samplers or self.images or self.baselines):
      raise ValueError("samplers=(): name one, or images, or set baselines")
    if len({*self.samplers}) < len(self.samplers):
      raise ValueError(
        f"samplers={fields.quote(self.samplers)}: name one of them twice"
      )


@registry.register(
  "jobs",
  "evaluate",
  sections={"evaluate": Evaluate},
  runtime=("evaluate",),
  configs_of=("train", "generate"),
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes results.json and a grid of samples of each sampler into evaluate.folder.

  With evaluate.images, or in a work directory of the job `generate`, only these images
  are evaluated, and the file is images.json. The keys of a row are those of
  reports/results.py.

  Args:
    config: of the run.
    workdir: its work directory.

  Returns:
    The number of rows and the path of the file.

  Raises:
    UserError: a field or a file does not fit, or there are too few images.
  """
  images = config.evaluate.images
  if config.job == "generate":
    images = images or os.path.join(workdir, "images")
  folder = os.path.join(workdir, evaluation.results_folder(config))
  if images:
    name, rows = "images.json", [_evaluate_images(config, images, folder)]
  else:
    name, rows = "results.json", _evaluate_samplers(config, workdir, folder)
  path = os.path.join(folder, name)
  if jax.process_index() == 0:
    file_io.write_json(path, rows)
    partial = os.path.join(folder, PARTIAL)
    if storage.exists(partial):
      storage.remove(partial)
    print(results.table(rows))
  return f"measured {len(rows)} rows: {path}"


def _evaluate_images(
  config: ml_collections.ConfigDict, path: str, folder: str
) -> dict[str, Json]:
  """Returns the row of the images of an .npz file or a folder."""
  mesh, section, path = experiments.mesh(config), config.evaluate, downloads.local(path)
  if not section.features and not section.clip:
    raise UserError(
      "config.evaluate: has neither features nor clip; set features=inception:PATH or "
      "clip=DIR"
    )
  real = evaluation.real(config) if section.features else None
  try:
    if path.endswith(".npz") or image_shards.exists(path):
      dataset = npz.build(path=path)
    else:
      side, channels = (*real.shape[1:],) if real else (folder_lib.side(path), 3)
      dataset = folder_lib.build(dir=path, image_size=side, channels=channels)
    texts = prompts.of_images(path) if section.clip else None
  except ValueError as error:
    raise UserError(f"config.evaluate.images={path}: {error}") from error
  measure = evaluation.metric_fn(config, mesh, real, dataset.shape, texts)
  batches = evaluation.dataset_batches(dataset, mesh, section.batch_size)
  settings = {"images": dataset.digest().hex(), "evaluate": section.to_dict()}
  state = evaluation.snapshot(os.path.join(folder, PARTIAL), settings, mesh)
  metrics = measure(batches, dataset.size, state.arrays, state.save)
  return _row(os.path.basename(path), "given images", metrics, dataset.size)


def _evaluate_samplers(
  config: ml_collections.ConfigDict, workdir: str, folder: str
) -> list[dict[str, Json]]:
  """Returns a row for each sampler of a trained network, and writes their grids."""
  experiment, params = workdir_lib.trained(config, workdir)
  sampling.check_request(config, experiment, config.evaluate.num)
  samplers = [(s, sampling.build_sampler(config, s)) for s in config.evaluate.samplers]
  stored = workdir_lib.read(workdir)
  config = config.copy_and_resolve_references()
  config.data = stored.data
  real = evaluation.real(config) if config.evaluate.features else None
  metric_fn = functools.partial(
    evaluation.metric_fn,
    config,
    experiment.mesh,
    real,
    sampling.image_shape(experiment),
  )
  measure = metric_fn(prompts.of_samples(config))
  facts = losses.facts(stored.loss)
  model, diffusion = facts.title, facts.family == "diffusion"
  compute = _compute(workdir, config)
  scale = config.sample.guidance
  guided = "" if scale == 1 else f", guidance {scale:g}"
  path = os.path.join(folder, PARTIAL)
  state = evaluation.snapshot(path, _settings(config, workdir), experiment.mesh)
  rows, begun = _rows(state.arrays)
  if not rows and config.evaluate.baselines:
    rows = _baselines(config, experiment, metric_fn(None))
    state.save(lambda: {"rows": snapshot.pack(rows)}, now=True)
  names = [row["sampler"] for row in rows]
  for i, (name, sampler) in enumerate(samplers):
    if name + guided in names:
      continue

    def save(partial: evaluation.State) -> None:
      state.save(lambda: {"rows": snapshot.pack(rows), **partial()})

    label = f"evaluate {name} ({i + 1} of {len(samplers)})"
    metrics, images = _evaluate_sampler(
      config, experiment, sampler, params, measure, label, begun, save
    )
    begun = {}
    grid = name.replace("/", "-") + ".png"
    _, columns = sampling.grid_size(experiment)
    if jax.process_index() == 0:
      picture = image_io.grid(images, columns)
      image_io.save_png(os.path.join(folder, grid), picture)
    row = _row(model, name + guided, metrics, config.evaluate.num)
    row |= {"compute": compute, "grid": grid}
    # The other solvers of a diffusion model are baselines of its students.
    if diffusion and i > 0:
      row["kind"] = "baseline"
    rows.append(row)
    state.save(lambda: {"rows": snapshot.pack(rows)}, now=True)
  return rows


def _settings(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Json]:
  """Returns what determines the rows of the samplers of a network."""
  sections = ("data", "evaluate", "reference", "sample", "sampler")
  settings = {name: config[name].to_dict() for name in sections}
  return {**settings, "vae": config.vae, "newest": checkpoints_lib.newest(workdir)}


def _rows(
  arrays: Mapping[str, np.ndarray],
) -> tuple[list[dict[str, Json]], dict[str, np.ndarray]]:
  """Returns the rows in a stored state, and the state of the sampler after them."""
  begun = dict(arrays)
  if "rows" not in begun:
    return [], begun
  rows = snapshot.unpack(begun.pop("rows"))
  return records.check(rows, list[results.Result], PARTIAL, "remove it"), begun


def _row(
  model: str, sampler: str, metrics: dict[str, float], num: int
) -> dict[str, Json]:
  """Returns a row of results: descriptions, metrics, and None for what is unknown."""
  empty = dict.fromkeys(("evaluations", "images_per_second", "compute", "grid"))
  row = {"model": model, "sampler": sampler, "kind": "model", "images": num}
  return row | empty | metrics


def _baselines(
  config: ml_collections.ConfigDict,
  experiment: experiments.Experiment,
  measure: evaluation.MetricFn,
) -> list[dict]:
  """Returns the rows of training images and of samples of a Gaussian for each class.

  If the reference is the training images, one half of them is compared with the other.
  """
  dataset = experiment.dataset
  experiments.check_images(dataset)
  num = config.evaluate.num
  images, cond = dataset[np.arange(dataset.size)]
  order = np.random.default_rng(0).permutation(len(images))
  if config.reference.name or config.evaluate.reference:
    name, indices, measure_real = "training images", order[:num], measure
  else:
    indices, other = np.array_split(order, 2)
    reference = dataset.subset(other)
    measure_real = evaluation.metric_fn(
      config, experiment.mesh, reference, dataset.shape
    )
    name = "one half to the other"
  classes = dataset.class_of(cond, dataset.size)
  try:
    gaussian_samples = baselines.class_gaussian(images, classes, num)
  except ValueError as error:
    raise UserError(f"config.evaluate.baselines=True: {error}") from error
  real = measure_real(evaluation.array_batches(images[indices]), len(indices))
  gaussian = measure(evaluation.array_batches(gaussian_samples), num)
  rows = [
    _row("real data", name, real, len(indices)),
    _row("Gaussian per class", "full covariance", gaussian, num),
  ]
  return [row | {"kind": "baseline"} for row in rows]


def _evaluate_sampler(
  config: ml_collections.ConfigDict,
  experiment: experiments.Experiment,
  sampler: Sampler,
  params: Params,
  measure: evaluation.MetricFn,
  label: str,
  begun: Mapping[str, np.ndarray],
  save: evaluation.Save,
) -> tuple[dict[str, float], np.ndarray]:
  """Returns metrics and cost of evaluate.num samples, and the first images of them.

  The time is that of the sampler alone, without compilation. Only the features of a
  batch are kept, not its images.

  Args:
    config: of the run.
    experiment: of the run.
    sampler: to evaluate.
    params: of the network.
    measure: computes the metrics.
    label: of the progress.
    begun: state that an earlier run saved, {} for none.
    save: saves the state.
  """
  num, batch_size = (config.evaluate[k] for k in ("num", "batch_size"))
  num_shown, _ = sampling.grid_size(experiment)
  seconds = [*begun.get("seconds", ())]
  first_images = [*begun.get("images", ())]
  stats = {name: [begun[name]] if begun else [] for name in STORED_STATS}

  def batches(start: int) -> Iterator[streaming.Images]:
    active = jax.process_index() == 0
    with Progress(
      num, label=label, unit="image", initial=start, active=active
    ) as progress:
      for images, batch_stats, batch_seconds in _timed_batches(
        config, experiment, sampler, params, num, batch_size, start
      ):
        seconds.append(batch_seconds)
        for name, field in STORED_STATS.items():
          stats[name].append(getattr(batch_stats, field))
        first_images.extend(images[: max(num_shown - len(first_images), 0)])
        yield evaluation.array_images(images)
        progress.add(len(images))

  def save_all(state: evaluation.State) -> None:
    def arrays() -> dict[str, np.ndarray]:
      own = {name: np.concatenate(values) for name, values in stats.items()}
      own |= {"seconds": np.array(seconds), "images": np.stack(first_images)}
      return own | state()

    save(arrays)

  metrics = measure(batches, num, begun, save_all)
  metrics["images_per_second"] = num / sum(seconds)
  for name, values in stats.items():
    metrics[name] = float(np.concatenate(values).mean())
  if config.evaluate.latency:
    mesh = experiment.mesh
    num_parallel = mesh.size // mesh.shape["window"]  # devices of different images
    timed = _timed_batches(
      config, experiment, sampler, params, LATENCY_IMAGES * num_parallel, num_parallel
    )
    metrics["latency"] = float(np.median([seconds for _, _, seconds in timed]))
  return metrics, np.stack(first_images)


def _timed_batches(
  config: ml_collections.ConfigDict,
  experiment: experiments.Experiment,
  sampler: Sampler,
  params: Params,
  num: int,
  batch_size: int,
  start: int = 0,
) -> Iterator[tuple[np.ndarray, SamplingStats, float]]:
  """Yields images, statistics and seconds of each batch, without compilation.

  The first `start` images, whole batches, are left out.
  """
  field = "evaluate.batch_size"
  pipeline = sampling.pipeline(config, experiment)
  shape = (batch_size, *pipeline.shape)
  sampler = pipelines.with_window(
    pipeline.mesh, sampler, pipeline.placeholder, params, shape
  )
  compiled = pipelines.batch_sampler(pipeline, sampler)
  next(pipelines.batches(pipeline, compiled, params, num, batch_size, field))
  batches = pipelines.batches(pipeline, compiled, params, num, batch_size, field, start)
  begin = time.perf_counter()
  for images, stats in batches:
    yield images, stats, time.perf_counter() - begin
    begin = time.perf_counter()


def _compute(workdir: str, config: ml_collections.ConfigDict) -> float | None:
  """Returns the operations of training so far as a fraction of the teacher's."""
  teacher = workdir_lib.parent(workdir_lib.read(workdir)) or workdir
  return summary.flops_ratio(workdir, teacher, config.sample.checkpoint)
