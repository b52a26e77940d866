"""What metrics know of a set of images, added up batch by batch."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from sdiff_jax.metrics import frechet, inception_score
from sdiff_jax.metrics.features.base import FeatureExtractor, FeatureNetwork

# (rows int [n] -> images uint8 [n, H, W, C], number of images)
Images = tuple[Callable[[np.ndarray], np.ndarray], int]


class StreamingMoments(NamedTuple):
  """Sums over a part of a set of images.

  Attributes:
    moments: of the features.
    kept: features of the few images that precision and recall look at, float32 [n, D]
      of each batch.
    scores: sums of the Inception score, or None.
  """

  moments: frechet.Moments
  kept: tuple[np.ndarray, ...]
  scores: inception_score.Sums | None


def merged(a: StreamingMoments, b: StreamingMoments) -> StreamingMoments:
  """Returns the summary of two parts together."""
  both = a.scores is not None and b.scores is not None
  return StreamingMoments(
    frechet.merged(a.moments, b.moments),
    a.kept + b.kept,
    inception_score.merged(a.scores, b.scores) if both else None,
  )


def summarize(
  networks: list[tuple[FeatureNetwork, FeatureExtractor]],
  batches: Iterable[Images],
  size: int,
  keep: int,
) -> list[StreamingMoments]:
  """Returns a summary for each network; no more than a batch of images is held.

  Args:
    networks: with their runs.
    batches: of the images, each read once for every network.
    size: number of images in all the batches.
    keep: images whose features are kept, drawn at random, at most.

  Raises:
    ValueError: the batches hold another number of images.
  """
  chosen = np.zeros(size, bool)
  chosen[np.random.default_rng(0).permutation(size)[:keep]] = True
  split = inception_score.splits(size)
  totals: list[StreamingMoments | None] = [None] * len(networks)
  first = 0
  for take, count in batches:
    if first + count > size:
      raise ValueError(f"more than the {size} images that were announced")
    for i, (network, extract) in enumerate(networks):
      at = first
      for features in extract(take, count):
        rows = slice(at, at + len(features))
        part = _part(network, features, chosen[rows], split[rows])
        totals[i] = part if totals[i] is None else merged(totals[i], part)
        at = rows.stop
    first += count
  if first != size or not size:
    raise ValueError(f"{first} images, where {size} were announced")
  return totals


def _part(
  network: FeatureNetwork, features: np.ndarray, chosen: np.ndarray, split: np.ndarray
) -> StreamingMoments:
  scores = None
  if network.head is not None:
    scores = inception_score.sums(features @ network.head, split)
  return StreamingMoments(frechet.moments(features), (features[chosen],), scores)
