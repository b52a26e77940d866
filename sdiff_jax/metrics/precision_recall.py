"""Improved precision and recall of a set of samples."""

import numpy as np


def precision_recall(
  real: np.ndarray, fake: np.ndarray, k: int = 3
) -> tuple[float, float]:
  """Measures how much of each set lies on the manifold of the other.

  The manifold of a set is the union of balls round its points, each as wide as the
  distance to the k-th nearest other point of the set. Precision is the share of fake
  points on the real manifold, recall that of real points on the fake one.

  Args:
    real: features of data, [N, D], N > k.
    fake: features of samples, [M, D], M > k.
    k: which neighbour sets the radius, not counting the point itself.

  Returns:
    (precision, recall), both in [0, 1].

  Raises:
    ValueError: a set has no k-th neighbour, or the numbers of features differ.

  Reference: Kynkaanniemi et al., arXiv:1904.06991, eq. 1-2.
  """
  if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
    raise ValueError(
      f"real and fake must be [N, D] and [M, D], got {list(real.shape)} and "
      f"{list(fake.shape)}"
    )
  if not 1 <= k < min(len(real), len(fake)):
    raise ValueError(
      f"k={k} must be at least 1 and less than the number of points, "
      f"{len(real)} real and {len(fake)} fake"
    )
  return _covered(fake, real, k), _covered(real, fake, k)


def _covered(points: np.ndarray, centres: np.ndarray, k: int) -> float:
  """Share of the points [N, D] that lie in some ball round a centre [M, D]."""
  from sklearn import metrics, neighbors  # slow to import

  # Features are wide, where trees lose to brute force.
  search = neighbors.NearestNeighbors(n_neighbors=k, algorithm="brute").fit(centres)
  # Called without points, kneighbors leaves each centre out of its own neighbours.
  radii = search.kneighbors()[0][:, -1]
  # Chunks keep memory at scikit-learn's working_memory (1 GiB), whatever N and M.
  chunks = metrics.pairwise_distances_chunked(points, centres)
  inside = sum((chunk <= radii).any(axis=1).sum() for chunk in chunks)
  return float(inside / len(points))
