"""References: their numbers, and that a kept one is used and no wrong one is."""

import pathlib
import pickle

import numpy as np
import pytest

from sdiff_jax.metrics import FeatureSet, frechet, precision_recall
from sdiff_jax.metrics.features import FeatureNetwork
from sdiff_jax.metrics.statistics import reference_statistics, streaming
from sdiff_jax.types import UserError

RNG = np.random.default_rng(0)
REAL = RNG.standard_normal((300, 5)).astype(np.float32)
FAKE = (RNG.standard_normal((200, 5)) * 1.3 + 0.2).astype(np.float32)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
  monkeypatch.setattr(reference_statistics, "FOLDER", str(tmp_path / "references"))
  return tmp_path / "references"


def never():
  raise AssertionError("computed again")


def run(key="frechet", step=64):
  """The identity as a feature network, with its metrics."""
  net = FeatureNetwork(key, lambda params, x: x, None)

  def extract(take, size):
    for first in range(0, size, step):
      yield take(np.arange(first, min(first + step, size)))

  metrics = (frechet.build(network=net), precision_recall.build(network=net))
  return streaming.FeatureRun(net, extract, metrics)


def summary(features, keep=10**6, step=64):
  """The statistics of features, collected in parts."""
  third = len(features) // 3
  batches = [(part.__getitem__, len(part)) for part in np.split(features, [third])]
  return streaming.summarize([run(step=step)], batches, len(features), keep)[0]


def reference(features, keep=10**6) -> FeatureSet:
  return streaming.feature_set(summary(features, keep))


def test_measures_are_those_of_the_two_sets():
  measured = streaming.measure(run(), summary(FAKE), reference(REAL))
  distance = frechet.distance(frechet.statistics(FAKE), frechet.statistics(REAL))
  assert measured.keys() == {"frechet", "precision", "recall"}
  assert measured["frechet"] == pytest.approx(distance, rel=1e-12)
  both = precision_recall.precision_recall(REAL, FAKE)
  assert (measured["precision"], measured["recall"]) == both


def test_neighbors_are_a_random_part_of_large_sets():
  known = reference(REAL, keep=50)
  np.testing.assert_allclose(known.mean, frechet.statistics(REAL).mean, rtol=1e-12)
  assert known.features.shape == (50, 5)
  rows = {row.tobytes() for row in known.features}
  assert len(rows) == 50
  assert rows <= {row.tobytes() for row in REAL}
  assert rows != {row.tobytes() for row in REAL[:50]}


def test_without_neighbors_there_is_the_distance_alone():
  none = reference(REAL, keep=0)
  assert none.features.shape == (0, 5)
  assert streaming.measure(run("fid"), summary(FAKE), none).keys() == {"fid"}
  fake = summary(FAKE, keep=0)
  assert streaming.measure(run("fid"), fake, none).keys() == {"fid"}
  assert streaming.measure(run("fid"), fake, reference(REAL)).keys() == {"fid"}


def test_too_few_images():
  real = reference(REAL)
  with pytest.raises(ValueError, match="3 samples and 300 real images .* at least 4"):
    streaming.measure(run("fid"), summary(FAKE[:3]), real)
  with pytest.raises(ValueError, match="1 image has no covariance"):
    streaming.measure(run("fid"), summary(FAKE[:1], step=1), real)


def test_other_numbers_of_images_than_announced():
  net = FeatureNetwork("x", None, None)
  one = streaming.FeatureRun(net, lambda take, size: [take(size)], ())
  for size in (7, 9):
    with pytest.raises(ValueError, match=f"size={size}: the batches hold"):
      streaming.summarize([one], [(lambda n: REAL[:n], 8)], size, 0)


def test_written_statistics_are_read_back(tmp_path):
  a, b = frechet.statistics(REAL), frechet.statistics(FAKE[:, :3])
  path = str(tmp_path / "one.npz")
  reference_statistics.save(path, {"fd_dinov2": b})
  with np.load(path) as arrays:
    assert {*arrays} == {"mu", "sigma"}
  same(reference_statistics.read(path, "fd_dinov2"), b)
  reference_statistics.save(path, {"fd_dinov2": b, "fid": a})
  with np.load(path) as arrays:
    np.testing.assert_array_equal(arrays["mu"], a.mean)
  same(reference_statistics.read(path, "fid"), a)
  same(reference_statistics.read(path, "fd_dinov2"), b)


def same(found, expected):
  for x, y in zip(found, expected, strict=True):
    assert x.dtype == np.float64
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_statistics_of_edm2(tmp_path, protocol):
  """A dict of dicts of arrays, as EDM2 pickles it (protocol 4) and by others."""
  a, b = frechet.statistics(REAL), frechet.statistics(FAKE[:, :3])
  found = {"num_images": 50_000, "fid": {"mu": a.mean, "sigma": a.cov}}
  found["fd_dinov2"] = {"mu": b.mean, "sigma": np.asfortranarray(b.cov)}
  path = tmp_path / "img512.pkl"
  path.write_bytes(pickle.dumps(found, protocol))
  same(reference_statistics.read(str(path), "fid"), a)
  same(reference_statistics.read(str(path), "fd_dinov2"), b)
  with pytest.raises(UserError, match="no mu and sigma of frechet: it has fd_dinov2"):
    reference_statistics.read(str(path), "frechet")


def test_statistics_of_adm(tmp_path):
  """mu_s and sigma_s, of the spatial features, stand beside mu and sigma."""
  a = frechet.statistics(REAL)
  path = str(tmp_path / "VIRTUAL_x.npz")
  spatial = {"mu_s": np.zeros(7), "sigma_s": np.eye(7)}
  np.savez(path, mu=a.mean.astype(np.float32), sigma=a.cov, **spatial)
  np.testing.assert_allclose(
    reference_statistics.read(path, "fid").mean, a.mean, rtol=1e-6
  )
  np.testing.assert_array_equal(reference_statistics.read(path, "fid").cov, a.cov)


def test_statistics_that_are_none(tmp_path):
  def refused(message, name="x.npz"):
    with pytest.raises(UserError, match=message):
      reference_statistics.read(str(tmp_path / name), "fid")

  refused("no such file")
  np.savez(tmp_path / "x.npz", mu=np.zeros(3), sigma=np.eye(4))
  refused(r"mu \(3,\) and sigma \(4, 4\): must be \[D\] and \[D, D\]")
  np.savez(tmp_path / "x.npz", mu_other=np.zeros(3))
  refused("no mu and sigma of fid: it has mu_other")
  (tmp_path / "x.npz").write_bytes(b"PK")
  refused("damaged")
  ran = tmp_path / "ran"

  class Harmful:
    def __reduce__(self):
      return pathlib.Path.touch, (ran,)

  (tmp_path / "x.pkl").write_bytes(pickle.dumps({"fid": Harmful()}))
  refused("no code of the file was run", "x.pkl")
  assert not ran.exists()
  objects = {"fid": {"mu": np.array([None]), "sigma": np.eye(1)}}
  (tmp_path / "x.pkl").write_bytes(pickle.dumps(objects, 4))
  refused("array of objects", "x.pkl")
  (tmp_path / "x.pkl").write_bytes(pickle.dumps([1]))
  refused("no dict of metrics", "x.pkl")


COV = np.cov(REAL.T)
MEAN = REAL.mean(0).astype(np.float64)


@pytest.mark.parametrize(
  ("mean", "cov", "message"),
  [
    (MEAN, COV.astype(complex), "sigma is complex128: must be real floats"),
    (MEAN, np.round(COV).astype(int), "sigma is int64: must be real floats"),
    (MEAN, np.full((5, 5), "text"), "sigma is <U4: must be real"),
    (MEAN, COV.astype(np.float16), "sigma is float16: must be real floats of 32"),
    (np.zeros(5, int), COV, "mu is int64: must be real floats"),
    (MEAN, COV + np.triu(np.full((5, 5), 1e-2), 1), "sigma is not symmetric"),
    (MEAN, COV * np.nan, "sigma is not finite"),
    (MEAN, np.full((5, 5), np.inf), "sigma is not finite"),
    (np.full(5, np.inf), COV, "mu is not finite"),
    (MEAN, -COV, "sigma has the variance -.* on its diagonal"),
    (MEAN, COV + 10 - 10 * np.eye(5), "correlations beyond 1"),
    (np.zeros(0), np.zeros((0, 0)), r"must be \[D\] and \[D, D\]"),
    (MEAN, np.array([None]), "Object arrays cannot be loaded"),
  ],
)
def test_what_is_no_mean_and_covariance_is_refused(tmp_path, mean, cov, message):
  path = str(tmp_path / "x.npz")
  np.savez(path, mu=mean, sigma=cov)
  with pytest.raises(UserError, match=message) as error:
    reference_statistics.read(path, "fid")
  assert str(error.value).startswith(path)


def test_pickled_lists_are_no_statistics(tmp_path):
  path = tmp_path / "x.pkl"
  path.write_bytes(pickle.dumps({"fid": {"mu": [0.0], "sigma": [[1.0]]}}))
  with pytest.raises(UserError, match="mu or sigma that is no array"):
    reference_statistics.read(str(path), "fid")


def test_covariances_in_float32_are_read(tmp_path):
  path = str(tmp_path / "x.npz")
  np.savez(path, mu=MEAN.astype(np.float32), sigma=COV.astype(np.float32))
  np.testing.assert_allclose(reference_statistics.read(path, "fid").cov, COV, rtol=1e-6)


def test_a_reference_of_another_scale_is_refused():
  real = reference(REAL)
  wide = real._replace(mean=real.mean * 1e4, cov=real.cov * 1e8)
  with pytest.raises(ValueError, match="reference: .* of another network or another"):
    streaming.measure(run(), summary(FAKE), wide)


def test_features_that_are_not_finite_are_refused():
  bad = FAKE.copy()
  bad[77, 3] = np.nan
  with pytest.raises(ValueError, match="features: those of image 77 are not finite"):
    summary(bad)


def test_a_kept_reference_is_exact_and_not_computed_again():
  first = reference_statistics.cached([b"a", b"b"], lambda: reference(REAL))
  kept = reference_statistics.cached([b"a", b"b"], never)
  for a, b in zip(first, kept, strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("key", [[b"a"], [b"a", b"c"], [b"ab"], [b"b", b"a"]])
def test_another_key_is_another_reference(key):
  reference_statistics.cached([b"a", b"b"], lambda: reference(REAL))
  with pytest.raises(AssertionError, match="computed again"):
    reference_statistics.cached(key, never)


def test_what_one_process_lacks_is_made_on_all():
  reference_statistics.cached([b"a"], lambda: reference(REAL))
  asked = []
  with pytest.raises(AssertionError, match="computed again"):
    reference_statistics.cached([b"a"], never, lambda mine: asked.append(mine))
  assert asked == [True]


def test_a_damaged_file_is_made_anew(folder):
  first = reference_statistics.cached([b"a"], lambda: reference(REAL))
  (file,) = folder.iterdir()
  file.write_bytes(file.read_bytes()[:100])
  again = reference_statistics.cached([b"a"], lambda: reference(REAL))
  np.testing.assert_array_equal(first.cov, again.cov)
  np.testing.assert_array_equal(
    reference_statistics.cached([b"a"], never).cov, first.cov
  )
