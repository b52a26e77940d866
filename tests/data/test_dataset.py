"""Data sets: digests that change with any sample, and subsets."""

import numpy as np
import pytest

from sdiff_jax.data import Dataset, PixelCodec, class_cond, digits, npz

IMAGES = np.random.default_rng(0).integers(0, 256, (600, 4, 4, 1), dtype=np.uint8)
LABELS = np.arange(600, dtype=np.int32) % 3


def dataset(images=IMAGES, labels=LABELS) -> Dataset:
  def read(indices: np.ndarray):
    return images[indices], {"label": labels[indices]}

  return Dataset(read, len(images), class_cond(3), PixelCodec((4, 4, 1)))


@pytest.mark.parametrize("index", [0, 5, 255, 256, 599])
def test_a_digest_changes_with_any_sample(index):
  changed = IMAGES.copy()
  changed[index, 1, 2] ^= 1
  assert dataset().digest() == dataset(IMAGES.copy()).digest()
  assert dataset(changed).digest() != dataset().digest()
  labels = LABELS.copy()
  labels[index] = (labels[index] + 1) % 3
  assert dataset(labels=labels).digest() != dataset().digest()
  assert dataset(IMAGES[:-1]).digest() != dataset().digest()


def test_a_file_whose_images_change_has_another_digest(tmp_path):
  """Those that a sample of 64 images would not see."""
  path = tmp_path / "a.npz"
  np.savez(path, IMAGES, LABELS)
  first = npz.build(path=str(path)).digest()
  changed = np.random.default_rng(1).integers(0, 256, IMAGES.shape, dtype=np.uint8)
  probes = np.linspace(0, 599, 64).astype(int)
  changed[probes] = IMAGES[probes]
  np.savez(path, changed, LABELS)
  assert npz.build(path=str(path)).digest() != first
  np.savez(path, IMAGES, LABELS)
  assert npz.build(path=str(path)).digest() == first


def test_a_subset_has_its_samples_and_a_digest_of_its_own():
  whole = digits.build()
  indices = np.array([5, 3, 8])
  part = whole.subset(indices)
  assert len(part) == 3
  images, cond = part[np.array([2, 0])]
  expected, labels = whole[np.array([8, 5])]
  np.testing.assert_array_equal(images, expected)
  np.testing.assert_array_equal(cond["label"], labels["label"])
  digests = {whole.digest(), part.digest(), whole.subset(indices[::-1]).digest()}
  assert len(digests) == 3
