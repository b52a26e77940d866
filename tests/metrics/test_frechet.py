"""The Frechet distance against closed forms and against its peers."""

import functools
import pathlib

import hypothesis
import numpy as np
import pytest
import scipy.linalg
from hypothesis import strategies as st

from sdiff_jax.metrics import frechet

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "fid_arith.npz"
given = hypothesis.given(seed=st.integers(0, 10**6), dim=st.integers(1, 12))
# A busy machine is no defect.
settings = hypothesis.settings(deadline=None)


def random_statistics(rng: np.random.Generator, dim: int) -> frechet.Statistics:
  """Statistics of few enough rows that the covariance is often singular."""
  return frechet.statistics(rng.normal(size=(rng.integers(2, 20), dim)) * 3 + 1)


def rotation(rng: np.random.Generator, dim: int) -> np.ndarray:
  return np.linalg.qr(rng.normal(size=(dim, dim)))[0]


@pytest.mark.parametrize(
  ("name", "tolerance"),
  [("a", {"abs": 1e-6}), ("b", {"rel": 1e-6}), ("low", {"rel": 1e-4})],
)
def test_agrees_with_peers(name, tolerance):
  with np.load(FIXTURE) as arrays:
    a = frechet.statistics(arrays["feat_a"])
    b = frechet.statistics(arrays[f"feat_{name}"])
    for peer in ("", "_torchfidelity"):
      expected = float(arrays[f"fid_a_{name}{peer}"])
      assert frechet.distance(a, b) == pytest.approx(expected, **tolerance)


def test_statistics_are_float64_and_unbiased():
  # A large mean, which a float32 covariance would not survive.
  features = np.random.default_rng(0).normal(1e4, 1, (100, 5)).astype(np.float32)
  mean, cov = frechet.statistics(features)
  assert mean.dtype == cov.dtype == np.float64
  np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12)
  np.testing.assert_allclose(cov, np.cov(features.astype(np.float64).T), rtol=1e-9)


@settings
@given
def test_commuting_covariances(seed, dim):
  """Where A and B commute it is |mu_a - mu_b|^2 + sum_i (a_i - b_i)^2."""
  rng = np.random.default_rng(seed)
  q = rotation(rng, dim)
  gap = rng.normal(size=dim)
  # Some deviations are zero: singular covariances, of different null spaces.
  a, b = rng.uniform(0, 3, (2, dim)) * (rng.random((2, dim)) < 0.7)
  distance = frechet.distance(
    frechet.Statistics(gap, q * a**2 @ q.T),
    frechet.Statistics(np.zeros(dim), q * b**2 @ q.T),
  )
  # A null eigenvalue is only zero to rounding, and its root to the root of that.
  assert distance == pytest.approx(gap @ gap + ((a - b) ** 2).sum(), abs=1e-5)


@settings
@given
def test_equal_sets_have_distance_zero(seed, dim):
  a = random_statistics(np.random.default_rng(seed), dim)
  assert frechet.distance(a, a) == pytest.approx(0, abs=1e-6)


@settings
@given
def test_symmetric_and_invariant_to_rotation(seed, dim):
  rng = np.random.default_rng(seed)
  a, b = random_statistics(rng, dim), random_statistics(rng, dim)
  q = rotation(rng, dim)
  turned = [frechet.Statistics(q @ s.mean, q @ s.cov @ q.T) for s in (a, b)]
  distance = frechet.distance(a, b)
  assert frechet.distance(b, a) == pytest.approx(distance, abs=1e-5)
  assert frechet.distance(*turned) == pytest.approx(distance, abs=1e-5)


def test_bad_shapes_are_refused():
  with pytest.raises(ValueError, match=r"\[N >= 2, D\], got \[1, 3\]"):
    frechet.statistics(np.zeros((1, 3)))
  with pytest.raises(ValueError, match=r"got \[4, 3, 2\]"):
    frechet.statistics(np.zeros((4, 3, 2)))
  with pytest.raises(ValueError, match="b: must have the 3 features of a, got 1"):
    frechet.distance(
      frechet.statistics(np.zeros((4, 3))), frechet.statistics(np.zeros((4, 1)))
    )


@settings
@given
def test_moments_of_parts_are_those_of_the_whole(seed, dim):
  """Far from 0, where sums of squares would have lost the covariance."""
  rng = np.random.default_rng(seed)
  features = (rng.normal(size=(40, dim)) + 1e6).astype(np.float64)
  ends = np.sort(rng.integers(1, 40, 3))
  parts = [frechet.moments(p) for p in np.split(features, np.unique(ends))]
  left = functools.reduce(frechet.merged, parts)
  right = functools.reduce(lambda a, b: frechet.merged(b, a), parts)
  whole = frechet.statistics(features)
  for merged in (left, right):
    assert merged.count == 40
    mean, cov = frechet.estimated(merged)
    np.testing.assert_allclose(mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(cov, whole.cov, atol=1e-8)


@pytest.mark.parametrize(("rows", "other"), [(400, 300), (400, 20), (12, 20), (12, 12)])
def test_agrees_with_the_root_of_the_product(rows, other):
  """scipy's sqrtm of A B; singular products are brought to the range of one of them."""
  rng = np.random.default_rng(rows + other)
  a, b = (
    frechet.statistics(rng.normal(size=(n, 32)) @ rng.normal(size=(32, 32)) + shift)
    for n, shift in ((rows, 0), (other, 0.3))
  )
  # The eigenvalues of A B other than 0 are those of V^T A V S, B = V S V^T.
  values, vectors = np.linalg.eigh(b.cov)
  inside = values > 1e-9 * values.max()
  root, vectors = np.diag(np.sqrt(values[inside])), vectors[:, inside]
  product = root @ vectors.T @ a.cov @ vectors @ root
  values, turn = np.linalg.eigh(product)
  turn = turn[:, values > 1e-9 * values.max()]
  overlap = np.trace(scipy.linalg.sqrtm(turn.T @ product @ turn)).real
  gap = a.mean - b.mean
  expected = gap @ gap + np.trace(a.cov) + np.trace(b.cov) - 2 * overlap
  assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-6)
  if min(rows, other) > 32:
    overlap = np.trace(scipy.linalg.sqrtm(a.cov @ b.cov)).real
    expected = gap @ gap + np.trace(a.cov) + np.trace(b.cov) - 2 * overlap
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_moments_need_rows():
  with pytest.raises(ValueError, match=r"\[N >= 1, D\], got \[0, 3\]"):
    frechet.moments(np.zeros((0, 3)))
  with pytest.raises(
    ValueError, match="1 image has no covariance; at least 2 are needed"
  ):
    frechet.estimated(frechet.moments(np.zeros((1, 3))))
