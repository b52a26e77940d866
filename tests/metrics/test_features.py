"""The classifier's features: what ships, and that they can be made anew."""

import jax
import numpy as np
import pytest
from sklearn import datasets

from sdiff_jax.metrics.features import classifier, digest
from sdiff_jax.types import UserError


@pytest.fixture(scope="module")
def digits():
  bunch = datasets.load_digits()
  images = np.round(bunch.images[..., None] * 255 / 16).astype(np.uint8)
  return images, bunch.target


def shipped():
  with np.load(classifier.FOLDER / "digits.npz") as arrays:
    return dict(arrays)


@pytest.fixture(scope="module")
def features(digits):
  return classifier.predict(shipped(), digits[0])[0]


def test_the_network_of_metrics_is_the_same(digits, features):
  network = classifier.load("digits")
  made = jax.jit(network.apply)(network.params, digits[0][:40])
  np.testing.assert_allclose(made, features[:40], atol=1e-5)
  assert (network.metric, network.head) == ("frechet", None)


def test_digits_features_have_unit_mean_variance(features):
  assert features.shape == (1797, 64)
  assert features.dtype == np.float32
  assert np.trace(np.cov(features.T)) == pytest.approx(64, abs=1e-2)


def test_digits_logits_are_accurate(digits):
  images, labels = digits
  _, logits = classifier.predict(shipped(), images)
  assert np.mean(logits.argmax(axis=1) == labels) > 0.97


@pytest.mark.parametrize("size", [1, 512, 513])
def test_features_do_not_depend_on_the_batch(digits, features, size):
  some = slice(-size, None)
  alone = classifier.predict(shipped(), digits[0][some])[0]
  np.testing.assert_allclose(alone, features[some], atol=1e-5)


def test_features_move_nothing_implicitly(digits, features):
  with jax.transfer_guard("disallow"):
    alone = classifier.predict(shipped(), digits[0][:3])[0]
  np.testing.assert_allclose(alone, features[:3], atol=1e-5)


def test_fit_learns_and_repeats(tmp_path):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 200)
  images = rng.integers(0, 150, (200, 9, 12, 3))
  images[np.arange(200), :, :, labels] += 50
  images = images.astype(np.uint8)

  def fit():
    return classifier.fit(
      images, labels, classes=3, steps=40, batch_size=32, progress=False
    )

  weights, again = fit(), fit()
  assert weights.keys() == again.keys()
  for name, value in weights.items():
    np.testing.assert_array_equal(value, again[name], err_msg=name)

  features, logits = classifier.predict(weights, images)
  assert np.mean(logits.argmax(axis=1) == labels) > 0.9
  assert features.var(axis=0, ddof=1).sum() == pytest.approx(64, abs=1e-2)
  classifier.save(tmp_path / "x.npz", weights)
  stored = classifier.load(tmp_path / "x.npz")
  made = jax.jit(stored.apply)(stored.params, images)
  np.testing.assert_allclose(made, features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("images", "labels", "message"),
  [
    (np.zeros((4, 8, 8), np.uint8), np.zeros(4, int), r"\[N, H, W, C\], got uint8"),
    (np.zeros((4, 8, 8, 1)), np.zeros(4, int), "got float64"),
    (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(3, int), "4 integers from 0 to 1"),
    (np.zeros((4, 8, 8, 1), np.uint8), np.full(4, 2), "4 integers from 0 to 1"),
  ],
)
def test_fit_refuses_bad_data(images, labels, message):
  with pytest.raises(ValueError, match=message):
    classifier.fit(images, labels, classes=2)


def test_features_refuse_other_images(digits):
  network = classifier.load("digits")
  with pytest.raises(ValueError, match=r"\[N, 8, 8, 1\], got uint8 \[2, 9, 8, 1\]"):
    network.apply(network.params, np.zeros((2, 9, 8, 1), np.uint8))
  with pytest.raises(ValueError, match="got float32"):
    network.apply(network.params, digits[0].astype(np.float32))


@pytest.mark.parametrize("name", ["digit", "/nowhere/x.npz"])
def test_an_unknown_name_lists_what_ships(name):
  with pytest.raises(UserError, match=rf"features='{name}' .*\(.*digits.*\)"):
    classifier.load(name)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"scale": np.float32(np.nan)}, "scale is nan, not a number above 0"),
    ({"scale": np.array("text")}, "scale is text, not a number"),
    ({"scale": np.ones(2)}, "scale is .*, not a number"),
    ({"image_shape": np.array(8)}, r"image_shape is int64 \(\), not three integers"),
    (
      {"image_shape": np.array([2**40, 1, 1])},
      "image_shape is .*; sides are 1 to 8192",
    ),
    ({"image_shape": np.array([64, 64, 1])}, "is missing"),
    ({"image_shape": np.array([8, 8, 3])}, r"not floats \(3, 3, 3, 32\)"),
    ({"logits/bias": np.full(10, np.inf)}, "logits/bias is not finite"),
    ({"logits/bias": np.zeros(11)}, "logits/kernel is .* not floats"),
    ({"logits/bias": np.zeros(10, complex)}, "not floats"),
    ({"other": np.zeros(3)}, "other is no weight"),
    ({"Conv_0/kernel": None}, "Conv_0/kernel is missing"),
    ({"logits/bias": None}, "it has no logits/bias"),
    ({"scale": np.array([None])}, "Object arrays cannot be loaded"),
  ],
)
def test_files_that_hold_no_classifier_are_refused(tmp_path, changed, message):
  arrays = {k: x for k, x in (shipped() | changed).items() if x is not None}
  path = tmp_path / "features.npz"
  np.savez(path, **arrays)
  with pytest.raises(UserError, match=message) as error:
    classifier.load(path)
  assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("data", [b"", b"text", b"PK\5\6" + bytes(18)])
def test_damaged_files_of_a_classifier_are_refused(tmp_path, data):
  path = tmp_path / "features.npz"
  path.write_bytes(data)
  with pytest.raises(UserError, match="is no .npz|holds no classifier"):
    classifier.load(path)


def test_a_digest_of_a_network_depends_on_every_weight():
  network = classifier.load("digits")
  first = digest(network)
  assert digest(classifier.load("digits")) == first
  changed = network.params["logits/bias"].copy()
  changed[3] += 1
  assert (
    digest(network._replace(params=network.params | {"logits/bias": changed})) != first
  )
  assert digest(network._replace(metric="fid")) != first
