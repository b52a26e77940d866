"""Precision and recall against a loop, and where the answer is known."""

import hypothesis
import numpy as np
import pytest
import sklearn
from hypothesis import strategies as st

from sdiff_jax.metrics.precision_recall import precision_recall


def covered(points: np.ndarray, centres: np.ndarray, k: int) -> float:
  """The definition, word for word."""
  inside = 0
  for point in points:
    for i, centre in enumerate(centres):
      others = np.delete(centres, i, axis=0)
      radius = np.sort(np.linalg.norm(others - centre, axis=1))[k - 1]
      if np.linalg.norm(point - centre) <= radius:
        inside += 1
        break
  return inside / len(points)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 10**6), k=st.integers(1, 4), lattice=st.booleans()
)
def test_agrees_with_brute_force(seed, k, lattice):
  rng = np.random.default_rng(seed)
  n, m, dim = rng.integers((5, 5, 1), (30, 30, 5))
  real, fake = rng.normal(size=(n, dim)), rng.normal(0.5, 1, (m, dim))
  if lattice:
    # Duplicates, and points that lie on a ball's surface: whole numbers are exact.
    real, fake = np.round(2 * real), np.round(2 * fake)
  expected = covered(fake, real, k), covered(real, fake, k)
  assert precision_recall(real, fake, k) == expected


def test_chunks_do_not_matter():
  rng = np.random.default_rng(0)
  real, fake = rng.normal(size=(700, 8)), rng.normal(0.3, 1, (600, 8))
  whole = precision_recall(real, fake)
  with sklearn.config_context(working_memory=0.1):
    assert precision_recall(real, fake) == whole
  assert 0 < whole[0] < 1
  assert 0 < whole[1] < 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_identical_and_far_sets(dtype):
  real = np.random.default_rng(0).normal(size=(200, 64)).astype(dtype)
  assert precision_recall(real, real.copy()) == (1, 1)
  assert precision_recall(real, real + dtype(100)) == (0, 0)


def test_a_dropped_mode_costs_recall_alone():
  rng = np.random.default_rng(0)
  left, right = rng.normal(size=(2, 300, 2)) + np.array([[[-50.0, 0]], [[50, 0]]])
  fake = rng.normal(size=(300, 2)) * 0.5 - np.array([50.0, 0])
  precision, recall = precision_recall(np.concatenate([left, right]), fake)
  assert precision > 0.97
  assert 0.2 < recall < 0.5


def test_bad_input_is_refused():
  real = np.zeros((5, 2))
  with pytest.raises(ValueError, match=r"\[5, 2\] and \[5, 3\]"):
    precision_recall(real, np.zeros((5, 3)))
  with pytest.raises(ValueError, match="5 real and 3 fake"):
    precision_recall(real, real[:3], k=3)
  with pytest.raises(ValueError, match="k=0"):
    precision_recall(real, real, k=0)
