"""Simple models of a data set that a generative model must beat."""

import numpy as np


def class_gaussian(
  images: np.ndarray, labels: np.ndarray, num: int, seed: int = 0
) -> np.ndarray:
  """Draws from one Gaussian with full covariance for each class.

  Args:
    images: uint8 [N, ...].
    labels: int [N]; classes are drawn in turn.
    num: number of samples.
    seed: of the draw.

  Returns:
    uint8 [num, ...], rounded and clipped.
  """
  rng = np.random.default_rng(seed)
  classes = np.unique(labels)
  out = np.empty((num, *images.shape[1:]), np.uint8)
  for i, label in enumerate(classes):
    rows = images[labels == label].reshape(-1, out[0].size).astype(np.float64)
    mean, cov = rows.mean(0), np.cov(rows, rowvar=False)
    mine = out[i :: len(classes)]
    drawn = rng.multivariate_normal(mean, cov, len(mine), method="eigh")
    mine[:] = np.clip(np.round(drawn), 0, 255).reshape(mine.shape)
  return out
