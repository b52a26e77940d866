"""What a metric is, and what it knows of two sets of images."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sdiff_jax.types import PyTree

MOMENTS, FEATURES = "moments", "features"


class FeatureSet(NamedTuple):
  """A set of images as a metric sees it, in the features of one network.

  Attributes:
    mean: of the features, float64 [D]; None unless a metric needs "moments".
    cov: their unbiased covariance, float64 [D, D]; None like the mean.
    features: of images drawn at random, float32 [N, D]; N is 0 unless a metric needs
      "features".
  """

  mean: np.ndarray | None
  cov: np.ndarray | None
  features: np.ndarray


class Metric(NamedTuple):
  """A metric in the features of one network.

  Attributes:
    compute: (samples, real images or None, sums or None) -> {key of a value: value}.
      Real images are there if the metric needs something of them. A ValueError says
      why a set cannot be measured.
    needs: parts of both `FeatureSet`s that `compute` reads, of "moments" and
      "features". A metric that needs "features" is computed for the first network
      alone, and is left out where no features are kept.
    update: (features float32 [n, D], indices int [n] of the images, number N of images
      in the whole set) -> sums of these images; or None.
    merge: (sums, sums) -> sums of both; needed with `update`.
  """

  compute: Callable[[FeatureSet, FeatureSet | None, PyTree], dict[str, float]]
  needs: tuple[str, ...] = ()
  update: Callable[[np.ndarray, np.ndarray, int], PyTree] | None = None
  merge: Callable[[PyTree, PyTree], PyTree] | None = None
