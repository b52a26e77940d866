"""Files of MNIST's format: what they hold, and every way in which they are wrong."""

import gzip
import os
import struct

import numpy as np
import pytest

from sdiff_jax.data import idx
from sdiff_jax.types import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 8, 4), dtype=np.uint8)
LABELS = np.array([3, 1, 0, 2, 2, 9], np.uint8)


def packed(array: np.ndarray) -> bytes:
  """Returns an array as IDX: magic number, sizes, bytes."""
  header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
  return header + array.tobytes()


def put(folder, images=None, labels=None, *, split="train", zipped=False):
  """Writes the two files of a split."""
  for name, data in (
    (f"{split}-images-idx3-ubyte", packed(IMAGES) if images is None else images),
    (f"{split}-labels-idx1-ubyte", packed(LABELS) if labels is None else labels),
  ):
    if zipped:
      (folder / f"{name}.gz").write_bytes(gzip.compress(data))
    else:
      (folder / name).write_bytes(data)
  return str(folder)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_images_and_labels_are_those_of_the_files(tmp_path, zipped, split, prefix):
  source = idx.build(dir=put(tmp_path, split=prefix, zipped=zipped), split=split)
  images, cond = source[np.array([5, 0, 5])]
  labels = cond["label"]
  np.testing.assert_array_equal(images, IMAGES[[5, 0, 5], ..., None])
  np.testing.assert_array_equal(labels, [9, 3, 9])
  assert labels.dtype == np.int32
  assert (source.size, source.shape, source.num_classes) == (6, (8, 4, 1), 10)


def test_resizing_averages_areas(tmp_path):
  square = RNG.integers(0, 256, (6, 8, 8), dtype=np.uint8)
  source = idx.build(dir=put(tmp_path, packed(square)), image_size=4)
  images, _ = source[np.arange(6)]
  assert images.shape == (6, *source.shape) == (6, 4, 4, 1)
  means = square.reshape(6, 4, 2, 4, 2).mean((2, 4))
  assert np.abs(images[..., 0] - means).max() <= 1  # rows and columns are rounded


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({"images": packed(LABELS)}, "starts with 00000801 and not 00000803"),
    ({"labels": packed(IMAGES)}, "starts with 00000803 and not 00000801"),
    ({"images": b"\x89PNG and so on"}, "starts with 89504e47"),
    ({"images": b""}, "starts with nothing and not"),
    ({"images": packed(IMAGES)[:-1]}, "holds 191 bytes where its header says 6 x 8"),
    ({"images": packed(IMAGES) + b"x"}, "holds 193 bytes where its header says"),
    ({"images": packed(IMAGES)[:9]}, "holds 0 bytes where its header says"),
    ({"images": packed(IMAGES[:0])}, "holds 0 bytes where its header says 0 x 8 x 4"),
    ({"labels": packed(LABELS[:5])}, "6 images but 5 labels of split 'train'"),
  ],
)
def test_a_damaged_file_is_named(tmp_path, files, message):
  folder = put(tmp_path, **files)
  with pytest.raises(UserError) as caught:
    idx.build(dir=folder)
  assert message in str(caught.value)
  assert folder in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "block", "plain"])
def test_a_damaged_archive_is_named(tmp_path, damage):
  folder = put(tmp_path, zipped=True)
  path = tmp_path / "train-images-idx3-ubyte.gz"
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= damage == "flipped"
  data[10] |= 255 * (damage == "block")  # behind the header: a block of no known type
  path.write_bytes({"cut": data[:-20], "plain": packed(IMAGES)}.get(damage, data))
  with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is damaged"):
    idx.build(dir=folder)


def test_a_missing_file_says_what_to_install(tmp_path):
  folder = put(tmp_path)
  (tmp_path / "train-labels-idx1-ubyte").unlink()
  with pytest.raises(ValueError, match="apt-get install -y dataset-fashion-mnist") as e:
    idx.build(dir=folder)
  assert f"dir={folder!r}: has no train-labels" in str(e.value)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"split": "valid"}, "split='valid': must be one of train, test"),
    ({"classes": 9}, "classes=9: .* has the label 9; set it to 10"),
    ({"image_size": -1}, "image_size=-1: must be from 0 to 8192"),
    ({"mean": (0.0,) * 3}, r"mean=\(0.0, 0.0, 0.0\): .* 1 channel"),
    ({"std": ()}, r"std=\(\): must be a tuple of one or more"),
    ({"std": (0.0,)}, r"std=\(0.0,\): must be .*above 0"),
  ],
)
def test_fields_that_do_not_fit_are_refused(tmp_path, fields, message):
  folder = put(tmp_path)
  with pytest.raises(ValueError, match=message):
    idx.build(dir=folder, **fields)


@pytest.mark.skipif(not os.path.isdir(idx.FOLDER), reason="no dataset-fashion-mnist")
@pytest.mark.parametrize(("split", "size"), [("train", 60_000), ("test", 10_000)])
def test_fashion_mnist_has_the_moments_of_the_defaults(split, size):
  source = idx.build(split=split)
  assert (source.size, source.shape, source.num_classes) == (size, (28, 28, 1), 10)
  images, cond = source[np.arange(size)]
  labels = cond["label"]
  assert np.bincount(labels).tolist() == [size // 10] * 10
  x0 = source.codec.encode(images[:10_000], 0.5)
  assert x0.mean() == pytest.approx(0, abs=0.005)
  assert x0.std() == pytest.approx(0.5, abs=0.005)
