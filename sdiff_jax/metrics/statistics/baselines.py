"""Baselines: simple models of a data set, which a generative model must beat."""

import numpy as np


def class_gaussian(
  images: np.ndarray, labels: np.ndarray, num: int, seed: int = 0
) -> np.ndarray:
  """Draws from one Gaussian with full covariance for each class.

  Args:
    images: uint8 [N, ...].
    labels: int [N]. Sample k has the class k modulo the number of classes.
    num: number of samples.
    seed: of the random numbers.

  Returns:
    uint8 [num, ...], rounded and clipped.

  Raises:
    ValueError: a class has one image, which has no covariance.
  """
  rng = np.random.default_rng(seed)
  classes, counts = np.unique(labels, return_counts=True)
  if counts.min() < 2:
    raise ValueError(
      f"labels: class {classes[counts.argmin()]} has one image, and a covariance needs two"
    )
  out = np.empty((num, *images.shape[1:]), np.uint8)
  for i, label in enumerate(classes):
    pixels = images[labels == label].reshape(-1, out[0].size).astype(np.float64)
    mean, cov = pixels.mean(0), np.cov(pixels, rowvar=False)
    of_class = out[i :: len(classes)]
    samples = rng.multivariate_normal(mean, cov, len(of_class), method="eigh")
    of_class[:] = np.clip(np.round(samples), 0, 255).reshape(of_class.shape)
  return out
