"""Inception score: confidence of a classifier on each image, and diversity of all."""

from typing import NamedTuple

import numpy as np

from sdiff_jax import registry
from sdiff_jax.metrics._metric import FeatureSet, Metric
from sdiff_jax.metrics.features import FeatureNetwork

SPLITS = 10


class Sums(NamedTuple):
  """Sums over a part of a set of images; sums of two parts add up field by field.

  Attributes:
    count: number of images in each split, float64 [SPLITS].
    information: sum over the images of sum_y p(y|x) log p(y|x), [SPLITS].
    classes: sum over the images of p(y|x), [SPLITS, K].
  """

  count: np.ndarray
  information: np.ndarray
  classes: np.ndarray


def splits(size: int) -> np.ndarray:
  """Returns the split of each image, int [size]: SPLITS consecutive parts of one size."""
  ends = np.arange(1, SPLITS + 1) * size // SPLITS
  return np.searchsorted(ends, np.arange(size), side="right")


def sums(logits: np.ndarray, split: np.ndarray) -> Sums:
  """Returns the sums of a batch of images.

  Args:
    logits: of the classifier, [n, K].
    split: of each image, int [n].
  """
  x = logits.astype(np.float64)
  x -= x.max(axis=1, keepdims=True)
  log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
  p = np.exp(log_p)
  member = (split == np.arange(SPLITS)[:, None]).astype(np.float64)
  return Sums(member.sum(1), member @ (p * log_p).sum(1), member @ p)


def merged(a: Sums, b: Sums) -> Sums:
  """Returns the sums of two parts together."""
  return Sums(*(x + y for x, y in zip(a, b, strict=True)))


def score(whole: Sums) -> float:
  """Returns the mean over the splits of exp(E_x KL(p(y|x) || p(y))).

  Reference: Salimans et al., arXiv:1606.03498, section 4.
  """
  filled = whole.count > 0
  count = whole.count[filled]
  p = whole.classes[filled] / count[:, None]
  log_p = np.log(np.maximum(p, np.finfo(np.float64).tiny))
  divergence = whole.information[filled] / count - (p * log_p).sum(1)
  return float(np.exp(divergence).mean())


@registry.register(
  "metrics",
  "inception_score",
  columns={"inception_score": ("IS", "{:.2f}", "Inception score, higher is better")},
)
def build(*, network: FeatureNetwork) -> Metric | None:
  """Returns the Inception score of a feature network that has logits."""
  if network.head is None:
    return None

  def update(features: np.ndarray, indices: np.ndarray, size: int) -> Sums:
    return sums(features @ network.head, splits(size)[indices])

  def compute(
    samples: FeatureSet, real: FeatureSet | None, totals: Sums
  ) -> dict[str, float]:
    del samples, real
    return {"inception_score": score(totals)}

  return Metric(compute, update=update, merge=merged)
