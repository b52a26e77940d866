"""Frechet distance between two sets of features (FID, where they are Inception's)."""

from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
  """What the Frechet distance knows of a set of features.

  Attributes:
    mean: float64 [D].
    cov: float64 [D, D], the unbiased estimate (divided by N - 1).
  """

  mean: np.ndarray
  cov: np.ndarray


class Moments(NamedTuple):
  """What part of a set of features adds to its statistics.

  Attributes:
    count: number of rows.
    mean: float64 [D].
    scatter: float64 [D, D], the sum of (x - mean) (x - mean)^T.
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray


def moments(features: np.ndarray) -> Moments:
  """Returns the moments of features [N, D], in float64.

  Raises:
    ValueError: features are not a matrix of at least one row.
  """
  if features.ndim != 2 or not len(features):
    raise ValueError(f"features must be [N >= 1, D], got {list(features.shape)}")
  mean = features.mean(axis=0, dtype=np.float64)
  centred = features - mean
  return Moments(len(features), mean, centred.T @ centred)


def merged(a: Moments, b: Moments) -> Moments:
  """Returns the moments of two parts together, none of whose rows are needed.

    S = S_a + S_b + (n_a n_b / n) d d^T,   d = mu_b - mu_a

  No difference of large numbers is taken, so parts add up as well as the whole does.

  Reference: Chan, Golub & LeVeque 1979, eq. 2.1.
  """
  count, gap = a.count + b.count, b.mean - a.mean
  scatter = a.scatter + b.scatter
  scatter += np.outer(gap, gap) * (a.count * b.count / count)
  return Moments(count, a.mean + gap * (b.count / count), scatter)


def estimated(whole: Moments) -> Statistics:
  """Returns the statistics of a set of at least two rows.

  Raises:
    ValueError: there are fewer.
  """
  if whole.count < 2:
    raise ValueError(f"a covariance needs two rows at least, got {whole.count}")
  return Statistics(whole.mean, whole.scatter / (whole.count - 1))


def statistics(features: np.ndarray) -> Statistics:
  """Estimates mean and covariance in float64.

  Args:
    features: [N, D], N >= 2.

  Returns:
    Statistics of the N rows.

  Raises:
    ValueError: features are not a matrix of at least two rows.
  """
  if features.ndim != 2 or len(features) < 2:
    raise ValueError(f"features must be [N >= 2, D], got {list(features.shape)}")
  return estimated(moments(features))


def distance(a: Statistics, b: Statistics) -> float:
  """Computes the squared 2-Wasserstein distance between two Gaussians.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^{1/2})

  The trace of (A B)^{1/2} is the sum of the singular values of A^{1/2} B^{1/2}. Those
  are exact to rounding for singular covariances too, where the roots of eigenvalues
  of A B are only exact to the root of rounding.

  Args:
    a: statistics of one set, D features.
    b: statistics of the other, D features too.

  Returns:
    The distance in squared units of the features; rounding can make that of equal
    sets slightly negative.

  Raises:
    ValueError: the numbers of features differ.

  Reference: Heusel et al., arXiv:1706.08500, eq. 6.
  """
  if a.mean.shape != b.mean.shape:
    raise ValueError(f"sets of {a.mean.size} and of {b.mean.size} features")
  overlap = np.linalg.norm(_root(a.cov) @ _root(b.cov), "nuc")
  gap = a.mean - b.mean
  return float(gap @ gap + np.trace(a.cov) + np.trace(b.cov) - 2 * overlap)


def _root(cov: np.ndarray) -> np.ndarray:
  """Symmetric square root of a covariance, [D, D]."""
  values, vectors = np.linalg.eigh(cov)
  return vectors * np.sqrt(values.clip(0)) @ vectors.T
