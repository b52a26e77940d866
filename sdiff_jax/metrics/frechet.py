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
  mean = features.mean(axis=0, dtype=np.float64)
  centred = features - mean
  return Statistics(mean, centred.T @ centred / (len(features) - 1))


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
