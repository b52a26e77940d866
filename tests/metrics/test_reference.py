"""References: their numbers, and that a kept one is used and no wrong one is."""

import numpy as np
import pytest

from sdiff_jax.metrics import frechet, precision_recall, reference

RNG = np.random.default_rng(0)
REAL = RNG.standard_normal((300, 5)).astype(np.float32)
FAKE = (RNG.standard_normal((200, 5)) * 1.3 + 0.2).astype(np.float32)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
  monkeypatch.setattr(reference, "FOLDER", str(tmp_path / "references"))
  return tmp_path / "references"


def never():
  raise AssertionError("computed again")


def test_measures_are_those_of_the_two_sets():
  measured = reference.measure(FAKE, reference.of(REAL))
  distance = frechet.distance(frechet.statistics(FAKE), frechet.statistics(REAL))
  assert measured["frechet"] == pytest.approx(distance, rel=1e-12)
  both = precision_recall.precision_recall(REAL, FAKE)
  assert (measured["precision"], measured["recall"]) == both


def test_neighbours_are_a_random_part_of_large_sets(monkeypatch):
  monkeypatch.setattr(reference, "NEIGHBOURS", 50)
  known = reference.of(REAL)
  np.testing.assert_array_equal(known.mean, frechet.statistics(REAL).mean)
  assert known.features.shape == (50, 5)
  rows = {row.tobytes() for row in known.features}
  assert len(rows) == 50
  assert rows <= {row.tobytes() for row in REAL}
  assert rows != {row.tobytes() for row in REAL[:50]}


def test_a_kept_reference_is_exact_and_not_computed_again():
  made = reference.cached([b"a", b"b"], lambda: reference.of(REAL))
  kept = reference.cached([b"a", b"b"], never)
  for a, b in zip(made, kept, strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("key", [[b"a"], [b"a", b"c"], [b"ab"], [b"b", b"a"]])
def test_another_key_is_another_reference(key):
  reference.cached([b"a", b"b"], lambda: reference.of(REAL))
  with pytest.raises(AssertionError, match="computed again"):
    reference.cached(key, never)


def test_a_damaged_file_is_made_anew(folder):
  made = reference.cached([b"a"], lambda: reference.of(REAL))
  (file,) = folder.iterdir()
  file.write_bytes(file.read_bytes()[:100])
  again = reference.cached([b"a"], lambda: reference.of(REAL))
  np.testing.assert_array_equal(made.cov, again.cov)
  np.testing.assert_array_equal(reference.cached([b"a"], never).cov, made.cov)
