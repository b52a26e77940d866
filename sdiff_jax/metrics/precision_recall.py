"""Improved precision and recall of a set of samples."""

import numpy as np

from sdiff_jax import registry
from sdiff_jax.metrics._metric import FEATURES, FeatureSet, Metric
from sdiff_jax.metrics.features import FeatureNetwork

NEIGHBOR = 3  # the k that build uses


def precision_recall(
  real: np.ndarray, fake: np.ndarray, k: int = 3
) -> tuple[float, float]:
  """Measures the fraction of each set that lies on the manifold of the other.

  The manifold of a set is the union of balls around its points, whose radius is the
  distance to the k-th nearest neighbor in the set. Precision is the fraction of fake
  points on the real manifold, recall the fraction of real points on the fake one.

  Args:
    real: features of data, [N, D], N > k.
    fake: features of samples, [M, D], M > k.
    k: number of the neighbor that determines the radius; the point itself does not
      count.

  Returns:
    (precision, recall), both in [0, 1].

  Raises:
    ValueError: a set has no k-th neighbor, or the numbers of features differ.

  Reference: Kynkaanniemi et al., arXiv:1904.06991, eq. 1-2.
  """
  if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
    raise ValueError(
      f"real, fake: must be [N, D] and [M, D], got {list(real.shape)} and "
      f"{list(fake.shape)}"
    )
  if not 1 <= k < min(len(real), len(fake)):
    raise ValueError(
      f"k={k}: must be at least 1 and less than the number of points, "
      f"{len(real)} real and {len(fake)} fake"
    )
  return _covered(fake, real, k), _covered(real, fake, k)


def _covered(points: np.ndarray, centers: np.ndarray, k: int) -> float:
  """Returns the fraction of points [N, D] inside a ball around a center [M, D]."""
  from sklearn import metrics, neighbors  # slow to import

  # Brute force is faster than trees in many dimensions.
  search = neighbors.NearestNeighbors(n_neighbors=k, algorithm="brute").fit(centers)
  # Called without points, kneighbors does not count a center as its own neighbor.
  radii = search.kneighbors()[0][:, -1]
  # Chunks bound the memory by scikit-learn's working_memory (1 GiB).
  chunks = metrics.pairwise_distances_chunked(points, centers)
  inside = sum((chunk <= radii).any(axis=1).sum() for chunk in chunks)
  return float(inside / len(points))


@registry.register(
  "metrics",
  "precision_recall",
  columns={
    "precision": ("Precision", "{:.1%}", "fraction of samples among real images"),
    "recall": ("Recall", "{:.1%}", "fraction of real images among samples"),
  },
)
def build(*, network: FeatureNetwork) -> Metric | None:
  """Returns precision and recall in the features of a network for distances."""
  if network.metric is None:
    return None

  def compute(samples: FeatureSet, real: FeatureSet, sums: None) -> dict[str, float]:
    del sums
    fake, real = samples.features, real.features
    if min(len(fake), len(real)) <= NEIGHBOR:
      raise ValueError(
        f"samples, real: {len(fake)} samples and {len(real)} real images are too few "
        f"for precision and recall: at least {NEIGHBOR + 1} must be kept, or none to "
        "leave them out"
      )
    precision, recall = precision_recall(real, fake, NEIGHBOR)
    return {"precision": precision, "recall": recall}

  return Metric(compute, needs=(FEATURES,))
