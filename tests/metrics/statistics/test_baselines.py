"""The Gaussian of each class has the moments of the class."""

import numpy as np
import pytest

from sdiff_jax.metrics.statistics import baselines


def test_moments_of_each_class():
  rng = np.random.default_rng(0)
  means = np.array([[60.0, 120.0], [150.0, 90.0]])
  mix = np.array([[10.0, 0.0], [8.0, 6.0]])
  labels = np.arange(4000) % 2
  images = means[labels] + rng.standard_normal((4000, 2)) @ mix.T
  images = np.round(images).astype(np.uint8).reshape(4000, 2, 1, 1)
  drawn = baselines.class_gaussian(images, labels, 20_000)
  assert drawn.shape == (20_000, 2, 1, 1)
  for label in (0, 1):
    rows = drawn[label::2].reshape(-1, 2).astype(np.float64)
    np.testing.assert_allclose(rows.mean(0), means[label], atol=0.7)
    np.testing.assert_allclose(np.cov(rows.T), mix @ mix.T, rtol=0.07)


def test_a_class_of_one_image_is_refused():
  images = np.zeros((3, 2, 1, 1), np.uint8)
  with pytest.raises(ValueError, match="labels: class 7 has one image"):
    baselines.class_gaussian(images, np.array([2, 7, 2]), 5)
