"""Evaluation of samples: feature networks, their metrics, and the real images."""

import json
from collections.abc import Callable, Iterable, Sequence

import jax
import ml_collections
import numpy as np
import tqdm
from jax.sharding import Mesh

from sdiff_jax import registry
from sdiff_jax.data import Dataset, folder, npz
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.io import image_io
from sdiff_jax.metrics import FEATURES, MOMENTS, FeatureSet, Metric, features, frechet
from sdiff_jax.metrics.features import FeatureNetwork
from sdiff_jax.metrics.statistics import reference_statistics, streaming
from sdiff_jax.metrics.statistics.streaming import FeatureRun
from sdiff_jax.types import UserError

NUM_PROBES = 64  # images that identify a data set in the cache of references
# (batches of images, number of images in all of them) -> values of metrics by key.
MetricFn = Callable[[Iterable[streaming.Images], int], dict[str, float]]


def results_folder(config: ml_collections.ConfigDict) -> str:
  """Returns the folder of results in a work directory: evaluate.folder.

  "_STEP" follows if the samples are those of the checkpoint of a step.
  """
  step = config.sample.checkpoint
  return config.evaluate.folder + (f"_{step}" if step else "")


def feature_runs(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  shape: tuple[int, ...],
  prompts: Sequence[str] | None = None,
) -> list[FeatureRun]:
  """Returns the networks of evaluate.features and evaluate.clip with their metrics.

  A network of which no metric can be computed is left out. Metrics that need features
  of single images are those of the first network.

  Args:
    config: of the experiment.
    mesh: of the devices.
    shape: of an image, [H, W, C].
    prompts: text of each image; None if the images have none.

  Raises:
    UserError: a file is missing or damaged, or a network takes other images.
  """
  with config_errors("config.evaluate"):
    networks = (
      features.load(config.evaluate.features) if config.evaluate.features else []
    )
  if config.evaluate.clip:
    networks += features.load(f"clip:{config.evaluate.clip}")
  runs, need_features = [], True
  for network in networks:
    feature_size(network, shape)
    metrics = []
    for name in registry.names("metrics"):
      metric = registry.build(
        "metrics", {"name": name}, network=network, prompts=prompts
      )
      if metric is not None and (need_features or FEATURES not in metric.needs):
        metrics.append(metric)
    if metrics:
      extract = features.shard_extractor(network, mesh, config.evaluate.batch_size)
      runs.append(FeatureRun(network, extract, tuple(metrics)))
      need_features = need_features and not runs[-1].needs(FEATURES)
  return runs


def real(config: ml_collections.ConfigDict) -> Dataset | None:
  """Returns the real images to compare with, or None if there are only statistics.

  They are those of evaluate.reference if that file has images besides its statistics,
  as ADM's files do for precision and recall; otherwise, without evaluate.reference,
  those of config.reference, or of config.data.
  """
  path = config.evaluate.reference
  if path:
    return npz.build(path=path) if path.endswith(".npz") and _images(path) else None
  section = config.reference if config.reference.name else config.data
  source = registry.build("data", section.to_dict())
  experiments.check_images(source)
  return source


def dataset_images(source: Dataset) -> streaming.Images:
  """Returns all images of a data set, which are read when they are needed."""
  return lambda indices: source[indices][0], source.size


def array_images(images: np.ndarray) -> streaming.Images:
  """Returns images uint8 [N, H, W, C]."""
  return images.__getitem__, len(images)


def metric_fn(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  real_images: Dataset | None,
  shape: tuple[int, ...],
  prompts: Sequence[str] | None = None,
) -> MetricFn:
  """Returns a function that computes all metrics of a set of images.

  Statistics of real images are those of evaluate.reference, or are computed and cached.

  Args:
    config: of the experiment.
    mesh: of the devices.
    real_images: to compare with; None if there are only statistics.
    shape: of an image, [H, W, C].
    prompts: text of each image; None if the images have none.

  Raises:
    UserError: files that do not fit, from here; too few images, from the function.
  """
  runs = feature_runs(config, mesh, shape, prompts)
  num_kept = config.evaluate.pr_num_images
  references = [
    _reference(config, mesh, run, real_images, shape, num_kept) for run in runs
  ]

  def measure(batches: Iterable[streaming.Images], size: int) -> dict[str, float]:
    values = {}
    summaries = streaming.summarize(runs, batches, size, num_kept)
    try:
      for run, samples, reference in zip(runs, summaries, references, strict=True):
        values |= streaming.measure(run, samples, reference)
    except ValueError as error:
      raise UserError(f"config.evaluate: {error}") from error
    return values

  return measure


def prompts_of(directory: str) -> list[str]:
  """Returns the prompt of each image in a folder that the job `generate` made.

  Raises:
    UserError: a file holds no prompt.
  """
  prompts = []
  for path in folder.files(directory):
    try:
      prompts.append(json.loads(image_io.about(path))["prompt"])
    except (*folder.UNREADABLE, KeyError, TypeError) as error:
      raise UserError(
        f"{path} holds no prompt: the CLIP score is of images of the job generate"
      ) from error
  return prompts


def _reference(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  run: FeatureRun,
  real_images: Dataset | None,
  shape: tuple[int, ...],
  num_kept: int,
) -> FeatureSet | None:
  """Returns the real images in the features of a network; None if no metric asks."""
  if not run.needs(MOMENTS) and not run.needs(FEATURES):
    return None
  num_kept = num_kept if run.needs(FEATURES) else 0
  size = feature_size(run.network, shape)
  statistics = _read_statistics(config, run.network, size)
  if real_images is None or (statistics and not num_kept):
    reference = FeatureSet(None, None, np.zeros((0, size), np.float32))
  else:
    reference = _cached_reference(mesh, run, real_images, num_kept)
  return reference._replace(**statistics._asdict()) if statistics else reference


def _read_statistics(
  config: ml_collections.ConfigDict, network: FeatureNetwork, size: int
) -> frechet.Statistics | None:
  """Returns the statistics in evaluate.reference, or None if it is empty."""
  path, metric = config.evaluate.reference, network.metric
  if not path:
    return None
  statistics = reference_statistics.read(path, metric)
  if len(statistics.mean) != size:
    raise UserError(
      f"{path} has statistics of {len(statistics.mean)} features, {metric} has {size}: "
      "they are of another network"
    )
  return statistics


def _cached_reference(
  mesh: Mesh, run: FeatureRun, real_images: Dataset, num_kept: int
) -> FeatureSet:
  """Returns all real images in the features of a network, computed once for all runs."""
  feature_size(run.network, real_images.shape)
  # A few images and their features identify the data and the network.
  indices = np.linspace(0, real_images.size - 1, NUM_PROBES).astype(int)
  probes = real_images[indices][0]
  probe_features = np.concatenate([*run.extract(*array_images(probes))])
  key = [str((real_images.size, real_images.shape, num_kept)).encode()]
  return reference_statistics.cached(
    [*key, probes.tobytes(), probe_features.tobytes()],
    lambda: feature_set_of(run, real_images, num_kept),
    # The network runs on all processes, or on none.
    lambda mine: bool(sharding.all_processes(np.array([mine]), mesh)[0]),
  )


def feature_set_of(run: FeatureRun, images: Dataset, num_kept: int) -> FeatureSet:
  """Returns all images of a data set in the features of a network; shows progress.

  Args:
    run: the network.
    images: the data set.
    num_kept: largest number of images whose features are kept.
  """

  def extract(take: Callable, size: int) -> Iterable[np.ndarray]:
    label = run.network.metric or "features"
    with tqdm.tqdm(total=size, desc=label, disable=None, leave=False) as bar:
      for batch in run.extract(take, size):
        yield batch
        bar.update(len(batch))

  everything = Metric(lambda *_: {}, needs=(MOMENTS, FEATURES))
  whole = FeatureRun(run.network, extract, (everything,))
  batches = [dataset_images(images)]
  (statistics,) = streaming.summarize([whole], batches, images.size, num_kept)
  return streaming.feature_set(statistics)


def feature_size(network: FeatureNetwork, shape: tuple[int, ...]) -> int:
  """Returns the number of features of images [H, W, C].

  Raises:
    UserError: the network takes other images.
  """
  images = jax.ShapeDtypeStruct((1, *shape), np.uint8)
  try:
    return jax.eval_shape(network.apply, network.params, images).shape[-1]
  except ValueError as error:
    raise UserError(f"config.evaluate.features: {error}") from error


def _images(path: str) -> bool:
  """Returns whether an .npz has images besides its statistics."""
  try:
    with np.load(path) as arrays:
      return "arr_0" in arrays.files
  except Exception:  # reported by `reference_statistics.read`
    return False
