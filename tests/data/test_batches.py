"""Batches: functions of (seed, k), whole epochs, exact scaling."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from sklearn import datasets

from sdiff_jax import config as configs
from sdiff_jax.data import PixelCodec, _loading, batches, digits
from sdiff_jax.jobs import train


@hypothesis.given(
  size=st.integers(1, 50), batch=st.integers(1, 70), seed=st.integers(0, 99)
)
def test_every_epoch_holds_every_image_once(size, batch, seed):
  count = -(-3 * size // batch)
  order = np.concatenate([_loading.indices(size, seed, k, batch) for k in range(count)])
  for epoch in range(3):
    part = order[epoch * size : (epoch + 1) * size]
    np.testing.assert_array_equal(np.sort(part), np.arange(size))


def test_seeds_and_epochs_shuffle_differently():
  one = _loading.indices(100, 0, 0, 100)
  assert (one != _loading.indices(100, 1, 0, 100)).any()
  assert (one != _loading.indices(100, 0, 1, 100)).any()
  np.testing.assert_array_equal(one, _loading.indices(100, 0, 0, 100))


def test_a_later_start_gives_the_same_batches():
  source = digits.build()
  options = {"seed": 3, "batch_size": 7, "sigma_d": 0.5}
  ones = batches(source, **options)
  later = batches(source, start=4, **options)
  for _ in range(4):
    next(ones)
  for _ in range(3):
    a, b = next(ones), next(later)
    np.testing.assert_array_equal(a["x0"], b["x0"])
    np.testing.assert_array_equal(a["cond"]["label"], b["cond"]["label"])


def test_digits_are_those_of_scikit_learn():
  expected = datasets.load_digits()
  images, cond = digits.build()[np.arange(1797)]
  np.testing.assert_array_equal(images[..., 0], np.round(expected.images * (255 / 16)))
  np.testing.assert_array_equal(cond["label"], expected.target)


def test_digits_have_the_standard_deviation_that_they_claim():
  source = digits.build()
  images, cond = source[np.arange(source.size)]
  labels = cond["label"]
  assert images.shape == (1797, *source.shape)
  assert images.dtype == np.uint8
  assert (images.min(), images.max()) == (0, 255)
  assert set(labels) == set(range(source.num_classes))
  x0 = source.codec.encode(images, 0.5)
  assert x0.dtype == np.float32
  assert x0.mean() == pytest.approx(0, abs=0.01)
  assert x0.std() == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("sigma_d", [0.5, 1.0])
def test_decode_inverts_encode_and_clips(sigma_d):
  codec = PixelCodec((4, 4, 3), mean=(-0.3, 0.1, 0.2), std=(0.7, 0.5, 0.4))
  images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
  x0 = codec.encode(images, sigma_d)
  np.testing.assert_array_equal(codec.to_images(x0, sigma_d), images)
  assert (np.asarray(codec.to_images(x0 + 100, sigma_d)) == 255).all()


def test_flipped_batches_are_functions_of_seed_and_number_alone():
  source = digits.build()
  options = {"seed": 3, "batch_size": 64, "sigma_d": 0.5}
  plain, ones = (batches(source, **options, flip=f) for f in (False, True))
  later = batches(source, **options, flip=True, start=2)
  flipped = []
  for k in range(4):
    a, b = next(plain), next(ones)
    np.testing.assert_array_equal(a["cond"]["label"], b["cond"]["label"])
    mirrored = _loading.flips(3, k, 64)
    expected = a["x0"].copy()
    expected[mirrored] = expected[mirrored, :, ::-1]
    np.testing.assert_array_equal(b["x0"], expected)
    flipped.append(mirrored)
    if k >= 2:
      np.testing.assert_array_equal(next(later)["x0"], b["x0"])
  assert (flipped[0] != flipped[1]).any()
  assert (flipped[0] != _loading.flips(4, 0, 64)).any()


@pytest.mark.parametrize("flip", [False, True])
def test_training_flips_if_its_config_says_so(tmp_path, monkeypatch, flip):
  class ReachedError(Exception):
    pass

  def reached(source, *, flip, **options):
    raise ReachedError(flip)

  monkeypatch.setattr(train, "batches", reached)
  config = configs.base()
  config.model.update(width=8, depth=1)
  assert config.train.flip is False
  config.train.flip = flip
  with pytest.raises(ReachedError, match=str(flip)):
    train.run(config, str(tmp_path))


def test_half_of_the_images_are_flipped():
  coins = np.stack([_loading.flips(0, k, 100) for k in range(400)])
  assert coins.dtype == bool
  # Five standard deviations of 40000 coins, and of 400 for each place in a batch.
  assert coins.mean() == pytest.approx(0.5, abs=5 * 0.5 / 200)
  assert np.abs(coins.mean(0) - 0.5).max() < 5 * 0.5 / 20


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mean": (0.0, 0.0)}, "mean=.*: the images have 3 channel"),
    ({"std": (1.0,) * 4}, "std=.*: the images have 3 channel"),
    ({"std": (1.0, 0.0, 1.0)}, "std=.*: must be above 0"),
  ],
)
def test_moments_that_do_not_fit_the_images_are_refused(fields, message):
  codec = PixelCodec((8, 8, 3), mean=(0.0,), std=(1.0,) * 3)
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(codec, **fields)
