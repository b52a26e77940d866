"""What metrics need of a set of images, collected batch by batch."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from sdiff_jax.metrics import FEATURES, MOMENTS, FeatureSet, Metric, frechet
from sdiff_jax.metrics.features import FeatureExtractor, FeatureNetwork

# (indices int [n] -> images uint8 [n, H, W, C], number of images)
Images = tuple[Callable[[np.ndarray], np.ndarray], int]


class FeatureRun(NamedTuple):
  """A feature network on its devices, and the metrics that are computed with it.

  Attributes:
    network: from images to features.
    extract: runs the network over many images.
    metrics: in these features.
  """

  network: FeatureNetwork
  extract: FeatureExtractor
  metrics: tuple[Metric, ...]

  def needs(self, part: str) -> bool:
    """Returns whether a metric needs "moments" or "features"."""
    return any(part in metric.needs for metric in self.metrics)


class StreamingStatistics(NamedTuple):
  """What a part of a set of images adds to the statistics of the set.

  Attributes:
    moments: of the features, or None if no metric needs them.
    features: of the images that are kept, float32 [n, D], for each batch.
    sums: of each metric, or None where it has none.
  """

  moments: frechet.Moments | None
  features: tuple[np.ndarray, ...]
  sums: tuple[np.ndarray, ...]


def merge(
  a: StreamingStatistics, b: StreamingStatistics, metrics: tuple[Metric, ...]
) -> StreamingStatistics:
  """Returns the statistics of two parts together."""
  moments = None
  if a.moments is not None and b.moments is not None:
    moments = frechet.merged(a.moments, b.moments)
  sums = (
    metric.merge(x, y) if metric.merge is not None else None
    for metric, x, y in zip(metrics, a.sums, b.sums, strict=True)
  )
  return StreamingStatistics(moments, a.features + b.features, tuple(sums))


class Partial(NamedTuple):
  """Statistics of the first images of a set.

  Attributes:
    count: number of these images.
    totals: their statistics in the features of each network.
  """

  count: int
  totals: tuple[StreamingStatistics, ...]


def to_arrays(partial: Partial) -> dict[str, np.ndarray]:
  """Returns statistics as named arrays, for a file."""
  arrays = {"count": np.array(partial.count)}
  for i, total in enumerate(partial.totals):
    joined = total._replace(features=(np.concatenate(total.features),))
    for j, leaf in enumerate(jax.tree.leaves(joined)):
      arrays[f"network{i}.{j}"] = np.asarray(leaf)
  return arrays


def from_arrays(arrays: Mapping[str, np.ndarray], runs: list[FeatureRun]) -> Partial:
  """Returns the statistics that `to_arrays` turned into arrays.

  Args:
    arrays: the arrays.
    runs: the same networks with the same metrics.

  Raises:
    KeyError: an array is missing.
  """
  totals = []
  for i, run in enumerate(runs):
    num = sum(name.startswith(f"network{i}.") for name in arrays)
    leaves = [arrays[f"network{i}.{j}"] for j in range(num)]
    # What a metric sums of an image tells which leaf is what.
    width = next(leaf for leaf in leaves if leaf.ndim == 2).shape[-1]
    example = _part(
      run, np.ones((1, width), np.float32), np.arange(1), np.ones(1, bool)
    )
    totals.append(jax.tree.unflatten(jax.tree.structure(example), leaves))
  return Partial(int(arrays["count"]), tuple(totals))


def summarize(
  runs: list[FeatureRun],
  batches: Iterable[Images],
  size: int,
  num_kept: int,
  *,
  resume: Partial | None = None,
  after_batch: Callable[[Partial], None] = lambda partial: None,
) -> list[StreamingStatistics]:
  """Returns the statistics of a set of images, in the features of each network.

  No more than a batch of images is held in memory.

  Args:
    runs: the networks with their metrics.
    batches: of the images, each read once for every network.
    size: N, number of images in all the batches.
    num_kept: largest number of images, drawn at random, whose features are kept.
    resume: statistics of the first images, which `batches` then lacks; None for none.
    after_batch: called with the statistics so far.

  Raises:
    ValueError: the batches hold another number of images.
  """
  keep = np.zeros(size, bool)
  keep[np.random.default_rng(0).permutation(size)[:num_kept]] = True
  totals: list[StreamingStatistics | None] = [None] * len(runs)
  first = 0
  if resume is not None:
    first, totals = resume.count, [*resume.totals]
  for take, count in batches:
    if first + count > size:
      raise ValueError(f"size={size}: the batches hold more images")
    for i, run in enumerate(runs):
      begin = first
      for features in run.extract(take, count):
        indices = np.arange(begin, begin + len(features))
        part = _part(run, features, indices, keep)
        totals[i] = part if totals[i] is None else merge(totals[i], part, run.metrics)
        begin += len(features)
    first += count
    after_batch(Partial(first, tuple(totals)))
  if first != size or not size:
    raise ValueError(f"size={size}: the batches hold {first} images")
  return totals


def _part(
  run: FeatureRun, features: np.ndarray, indices: np.ndarray, keep: np.ndarray
) -> StreamingStatistics:
  """Returns the statistics of one batch.

  Raises:
    ValueError: a feature is not finite.
  """
  finite = np.isfinite(features).all(axis=1)
  if not finite.all():
    raise ValueError(
      f"features: those of image {indices[~finite][0]} are not finite; the network may "
      "need a wider type, or its weights are damaged"
    )
  kept = features[keep[indices]] if run.needs(FEATURES) else features[:0]
  return StreamingStatistics(
    frechet.moments(features) if run.needs(MOMENTS) else None,
    (kept,),
    tuple(m.update and m.update(features, indices, len(keep)) for m in run.metrics),
  )


def feature_set(statistics: StreamingStatistics) -> FeatureSet:
  """Returns a whole set of images as metrics see it.

  Raises:
    ValueError: a metric needs a covariance, and there is one image.
  """
  mean = cov = None
  if statistics.moments is not None:
    mean, cov = frechet.estimated(statistics.moments)
  return FeatureSet(mean, cov, np.concatenate(statistics.features))


def measure(
  run: FeatureRun, statistics: StreamingStatistics, real: FeatureSet | None
) -> dict[str, float]:
  """Returns the values of the metrics of a network by their keys.

  Args:
    run: the network with its metrics.
    statistics: of the samples.
    real: the images to compare with; None if no metric needs them.

  Raises:
    ValueError: a set has too few images.
  """
  samples, values = feature_set(statistics), {}
  for metric, sums in zip(run.metrics, statistics.sums, strict=True):
    has_features = real is not None and len(samples.features) and len(real.features)
    if has_features or FEATURES not in metric.needs:
      values |= metric.compute(samples, real, sums)
  return values
