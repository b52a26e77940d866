"""Frechet distance between two sets of features; FID in those of Inception-v3."""

from typing import NamedTuple

import numpy as np

from sdiff_jax import registry
from sdiff_jax.metrics._metric import MOMENTS, FeatureSet, Metric
from sdiff_jax.metrics.features import FeatureNetwork

MAX_RATIO = 1000.0  # of the norms of two sets of features of the same network


class Statistics(NamedTuple):
  """Mean and covariance of a set of features.

  Attributes:
    mean: float64 [D].
    cov: float64 [D, D], the unbiased estimate (divided by N - 1).
  """

  mean: np.ndarray
  cov: np.ndarray


class Moments(NamedTuple):
  """Moments of a part of a set of features; those of two parts can be merged.

  Attributes:
    count: N, number of feature vectors.
    mean: float64 [D].
    scatter: float64 [D, D], the sum of (x - mean) (x - mean)^T.
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray


def moments(features: np.ndarray) -> Moments:
  """Returns the moments of features [N >= 1, D], computed in float64.

  Raises:
    ValueError: features are not [N >= 1, D].
  """
  if features.ndim != 2 or not len(features):
    raise ValueError(f"features: must be [N >= 1, D], got {list(features.shape)}")
  mean = features.mean(axis=0, dtype=np.float64)
  centered = features - mean
  return Moments(len(features), mean, centered.T @ centered)


def merged(a: Moments, b: Moments) -> Moments:
  """Returns the moments of two parts together, from those of each.

    S = S_a + S_b + (n_a n_b / n) d d^T,   d = mu_b - mu_a

  No difference of large numbers is taken, so merged moments are as accurate as moments
  of all features at once.

  Reference: Chan, Golub & LeVeque 1979, eq. 2.1.
  """
  count, gap = a.count + b.count, b.mean - a.mean
  scatter = a.scatter + b.scatter
  scatter += np.outer(gap, gap) * (a.count * b.count / count)
  return Moments(count, a.mean + gap * (b.count / count), scatter)


def estimated(whole: Moments) -> Statistics:
  """Returns mean and unbiased covariance of a set of at least two features.

  Raises:
    ValueError: there are fewer.
  """
  if whole.count < 2:
    raise ValueError(
      f"whole: {whole.count} image has no covariance; at least 2 are needed"
    )
  return Statistics(whole.mean, whole.scatter / (whole.count - 1))


def statistics(features: np.ndarray) -> Statistics:
  """Estimates mean and covariance in float64.

  Args:
    features: [N, D], N >= 2.

  Returns:
    Mean [D] and unbiased covariance [D, D].

  Raises:
    ValueError: features are not [N >= 2, D].
  """
  if features.ndim != 2 or len(features) < 2:
    raise ValueError(f"features: must be [N >= 2, D], got {list(features.shape)}")
  return estimated(moments(features))


def distance(a: Statistics, b: Statistics) -> float:
  """Computes the squared 2-Wasserstein distance between two Gaussians.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^{1/2})

  The trace of (A B)^{1/2} is the sum of the singular values of A^{1/2} B^{1/2}, which
  are accurate to machine epsilon for singular covariances, too. Square roots of the
  eigenvalues of A B are accurate to its square root only.

  Args:
    a: statistics of one set, D features.
    b: statistics of the other, D features too.

  Returns:
    The distance in squared units of the features. That of equal sets may be slightly
    negative because of rounding.

  Raises:
    ValueError: the numbers of features differ.

  Reference: Heusel et al., arXiv:1706.08500, eq. 6.
  """
  if a.mean.shape != b.mean.shape:
    raise ValueError(f"b: must have the {a.mean.size} features of a, got {b.mean.size}")
  overlap = np.linalg.norm(_root(a.cov) @ _root(b.cov), "nuc")
  gap = a.mean - b.mean
  return float(gap @ gap + np.trace(a.cov) + np.trace(b.cov) - 2 * overlap)


def check_scale(samples: Statistics, real: Statistics) -> None:
  """Raises a ValueError if features of two sets cannot be of the same network.

  The features of one network have similar sizes for all images, those of noise too.

  Args:
    samples: statistics of samples.
    real: statistics of real images.
  """
  sizes = [np.sqrt(x.mean @ x.mean + np.trace(x.cov)) for x in (samples, real)]
  if not all(map(np.isfinite, sizes)) or max(sizes) > MAX_RATIO * min(sizes):
    raise ValueError(
      f"reference: its features have the norm {sizes[1]:.3g}, and those of the samples "
      f"{sizes[0]:.3g}; they are of another network or another scale"
    )


def _root(cov: np.ndarray) -> np.ndarray:
  """Symmetric square root of a covariance, [D, D]."""
  values, vectors = np.linalg.eigh(cov)
  return vectors * np.sqrt(values.clip(0)) @ vectors.T


@registry.register("metrics", "frechet", columns={})  # the networks name its columns
def build(*, network: FeatureNetwork) -> Metric | None:
  """Returns the Frechet distance in the features of a network that defines one."""
  if network.metric is None:
    return None

  def compute(samples: FeatureSet, real: FeatureSet, sums: None) -> dict[str, float]:
    del sums
    a, b = (Statistics(x.mean, x.cov) for x in (samples, real))
    check_scale(a, b)
    return {network.metric: distance(a, b)}

  return Metric(compute, needs=(MOMENTS,))
