"""Evaluation of samples: feature networks, their metrics, and the real images."""

import hashlib
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from sdiff_jax import registry
from sdiff_jax.data import Dataset, npz
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.io import array_io
from sdiff_jax.io.progress import Progress
from sdiff_jax.io.snapshot import Snapshot
from sdiff_jax.metrics import FEATURES, MOMENTS, FeatureSet, Metric, features, frechet
from sdiff_jax.metrics.features import FeatureNetwork
from sdiff_jax.metrics.statistics import reference_statistics, streaming
from sdiff_jax.metrics.statistics.streaming import FeatureRun
from sdiff_jax.types import Json, UserError

NUM_PROBES = 64  # images whose features identify a network in the cache of references
CHUNK = 8  # batches of features in a batch of images, after which a state is saved
# Number of images to leave out at the start -> batches of the others.
Batches = Callable[[int], Iterable[streaming.Images]]
State = Callable[[], dict[str, np.ndarray]]  # returns the state of a measurement
Save = Callable[[State], None]  # saves a state if it is time to (see `io.snapshot`)


class MetricFn(Protocol):
  """Computes all metrics of a set of images."""

  def __call__(
    self,
    batches: Batches,
    size: int,
    stored: Mapping[str, np.ndarray] = ...,
    save: Save = ...,
  ) -> dict[str, float]:
    """Returns values of metrics by their keys.

    Args:
      batches: of the images.
      size: number of images.
      stored: state that an earlier run saved; {} for none.
      save: called after each batch.

    Raises:
      UserError: there are too few images.
    """
    ...


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
  name = "reference" if config.reference.name else "data"
  source = registry.build("data", config[name].to_dict(), f"config.{name}")
  experiments.check_images(source)
  return source


def dataset_batches(source: Dataset, mesh: Mesh, batch_size: int) -> Batches:
  """Returns all images of a data set, which are read when they are needed.

  Args:
    source: the data set.
    mesh: of the devices.
    batch_size: as for `features.shard_extractor`.
  """
  chunk = CHUNK * features.actual_batch_size(mesh, batch_size)

  def batches(start: int) -> Iterator[streaming.Images]:
    for first in range(start, source.size, chunk):
      count = min(chunk, source.size - first)
      yield lambda indices, first=first: source[first + indices][0], count

  return batches


def array_batches(images: np.ndarray) -> Batches:
  """Returns images uint8 [N, H, W, C] as one batch."""
  return lambda start: [] if start else [array_images(images)]


def array_images(images: np.ndarray) -> streaming.Images:
  """Returns images uint8 [N, H, W, C]."""
  return images.__getitem__, len(images)


def snapshot(path: str, settings: Mapping[str, Json], mesh: Mesh) -> Snapshot:
  """Returns a state on disk that all processes read, and process 0 writes.

  Args:
    path: of the file.
    settings: what determines the state.
    mesh: of the devices.
  """
  state = Snapshot(path, settings, write=jax.process_index() == 0)
  if jax.process_count() > 1:
    # If one process does not see the file, none uses it.
    seen = sharding.all_processes(np.array([bool(state.arrays)]), mesh)[0]
    state.arrays = state.arrays if seen else {}
  return state


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

  def measure(
    batches: Batches,
    size: int,
    stored: Mapping[str, np.ndarray] = types.MappingProxyType({}),
    save: Save = lambda state: None,
  ) -> dict[str, float]:
    values = {}
    summaries = _summarize(runs, batches, size, num_kept, stored, save)
    try:
      for run, samples, reference in zip(runs, summaries, references, strict=True):
        values |= streaming.measure(run, samples, reference)
    except ValueError as error:
      raise UserError(f"config.evaluate: {error}") from error
    return values

  return measure


def _summarize(
  runs: list[FeatureRun],
  batches: Batches,
  size: int,
  num_kept: int,
  stored: Mapping[str, np.ndarray],
  save: Save,
) -> list[streaming.StreamingStatistics]:
  """Returns the statistics of a set of images; resumes from a stored state."""
  resume = streaming.from_arrays(stored, runs) if "count" in stored else None
  return streaming.summarize(
    runs,
    batches(resume.count if resume else 0),
    size,
    num_kept,
    resume=resume,
    after_batch=lambda partial: save(lambda: streaming.to_arrays(partial)),
  )


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
    reference = _cached_reference(
      mesh, run, real_images, num_kept, config.evaluate.batch_size
    )
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
  mesh: Mesh, run: FeatureRun, real_images: Dataset, num_kept: int, batch_size: int
) -> FeatureSet:
  """Returns all real images in the features of a network, computed once for all runs."""
  feature_size(run.network, real_images.shape)
  # The weights and the features of a few images identify the network.
  indices = np.linspace(0, real_images.size - 1, NUM_PROBES).astype(int)
  probes = real_images[indices][0]
  probe_features = np.concatenate([*run.extract(*array_images(probes))])
  key = [str((real_images.size, real_images.shape, num_kept)).encode()]
  key += [real_images.digest(), features.digest(run.network), probe_features.tobytes()]
  digest = hashlib.sha256(b"\0".join(key)).hexdigest()[:16]
  path = os.path.join(reference_statistics.FOLDER, f"{digest}.partial.npz")

  def compute() -> FeatureSet:
    state = snapshot(path, {}, mesh)
    with config_errors("config.evaluate"):
      return feature_set_of(run, real_images, num_kept, mesh, batch_size, state)

  return reference_statistics.cached(
    key,
    compute,
    # The network runs on all processes, or on none.
    lambda mine: bool(sharding.all_processes(np.array([mine]), mesh)[0]),
  )


def feature_set_of(
  run: FeatureRun,
  images: Dataset,
  num_kept: int,
  mesh: Mesh,
  batch_size: int,
  state: Snapshot,
) -> FeatureSet:
  """Returns all images of a data set in the features of a network; shows progress.

  Args:
    run: the network.
    images: the data set.
    num_kept: largest number of images whose features are kept.
    mesh: of the devices.
    batch_size: as for `features.shard_extractor`.
    state: what an earlier, interrupted call has computed; removed at the end.
  """
  everything = Metric(lambda *_: {}, needs=(MOMENTS, FEATURES))
  with Progress(
    images.size,
    label=run.network.metric or "features",
    unit="image",
    initial=int(state.arrays.get("count", 0)),
    active=jax.process_index() == 0,
  ) as progress:

    def extract(take: Callable, size: int) -> Iterator[np.ndarray]:
      for batch in run.extract(take, size):
        progress.add(len(batch))
        yield batch

    whole = FeatureRun(run.network, extract, (everything,))
    batches = dataset_batches(images, mesh, batch_size)
    (statistics,) = _summarize(
      [whole], batches, images.size, num_kept, state.arrays, state.save
    )
  state.remove()
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
    return "arr_0" in array_io.npz_headers(path)
  except UserError:  # reported by `reference_statistics.read`
    return False
