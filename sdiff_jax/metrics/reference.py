"""What samples are measured against: features of real images, kept between runs."""

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from sdiff_jax.metrics import frechet, precision_recall

NEIGHBOURS = 10_000  # points of a set that precision and recall look at
FOLDER = os.path.expanduser("~/.cache/sdiff_jax/references")


class Reference(NamedTuple):
  """Features of real images.

  Attributes:
    mean: of the features, float64 [D].
    cov: their covariance, float64 [D, D].
    features: of the first images in a random order, float32 [N <= NEIGHBOURS, D].
  """

  mean: np.ndarray
  cov: np.ndarray
  features: np.ndarray


def of(features: np.ndarray) -> Reference:
  """Returns the reference of features float32 [N, D]."""
  order = np.random.default_rng(0).permutation(len(features))
  statistics = frechet.statistics(features)
  return Reference(*statistics, features[order[:NEIGHBOURS]])


def cached(key: Iterable[bytes], make: Callable[[], Reference]) -> Reference:
  """Returns `make()`, or what it returned when the key was last seen.

  Args:
    key: what the reference depends on: data, features.
    make: computes it.
  """
  digest = hashlib.sha256(b"\0".join(key)).hexdigest()[:16]
  path = os.path.join(FOLDER, f"{digest}.npz")
  try:
    with np.load(path) as arrays:
      return Reference(**arrays)
  except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
    made = make()
  os.makedirs(FOLDER, exist_ok=True)
  whole = f"{path}.{os.getpid()}.npz"
  np.savez(whole, **made._asdict())
  os.replace(whole, path)
  return made


def measure(features: np.ndarray, reference: Reference) -> dict[str, float]:
  """Returns the Frechet distance of features [N, D], and their precision and recall.

  Precision and recall look at the first NEIGHBOURS of the features.
  """
  real = frechet.Statistics(reference.mean, reference.cov)
  distance = frechet.distance(frechet.statistics(features), real)
  precision, recall = precision_recall.precision_recall(
    reference.features, features[:NEIGHBOURS]
  )
  return {"frechet": distance, "precision": precision, "recall": recall}
