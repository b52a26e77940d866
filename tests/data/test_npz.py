"""Images in .npz files, with and without classes."""

import numpy as np
import pytest

from sdiff_jax.data import npz
from sdiff_jax.types import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
LABELS = np.array([4, 0, 1, 1, 0])


@pytest.mark.parametrize("names", [("arr_0", "arr_1"), ("images", "labels")])
def test_both_names_of_the_arrays(tmp_path, names):
  path = tmp_path / "data.npz"
  np.savez_compressed(path, **dict(zip(names, (IMAGES, LABELS), strict=True)))
  source = npz.build(path=str(path))
  assert (source.size, source.shape, source.num_classes) == (5, (4, 6, 3), 5)
  images, cond = source[np.array([4, 0])]
  labels = cond["label"]
  np.testing.assert_array_equal(images, IMAGES[[4, 0]])
  np.testing.assert_array_equal(labels, [0, 4])
  assert labels.dtype == np.int32


def test_without_labels_there_are_no_classes(tmp_path):
  np.savez(tmp_path / "data.npz", IMAGES)
  source = npz.build(path=str(tmp_path / "data.npz"))
  assert source.num_classes == 0
  assert source[np.array([1, 2])][1] == {}


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"x": IMAGES}, "has no images: save them as arr_0 or images"),
    ({"images": IMAGES / 255}, "images are float64 (5, 4, 6, 3); save uint8"),
    ({"images": IMAGES[0]}, "images are uint8 (4, 6, 3); save uint8 [N, H, W, C]"),
    ({"images": IMAGES[:0]}, "images are uint8 (0, 4, 6, 3); save uint8"),
    ({"images": IMAGES.transpose(0, 3, 1, 2)}, "have 6 channels; save 1 or 3"),
    ({"images": IMAGES, "labels": LABELS[:4]}, "labels are int64 (4,); save integers"),
    ({"images": IMAGES, "labels": LABELS * 1.0}, "labels are float64 (5,); save"),
    ({"images": IMAGES, "labels": LABELS - 1}, "a label is -1; number them from 0"),
    ({"images": IMAGES.astype(object)}, "Object arrays cannot be loaded"),
  ],
)
def test_arrays_of_another_form_are_refused(tmp_path, arrays, message):
  path = tmp_path / "data.npz"
  np.savez(path, **arrays)
  with pytest.raises(UserError) as caught:
    npz.build(path=str(path))
  assert message in str(caught.value)
  assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "flipped"])
def test_a_damaged_file_is_named(tmp_path, damage):
  path = tmp_path / "data.npz"
  np.savez(path, IMAGES)
  data = bytearray(path.read_bytes())
  middle = data.index(IMAGES.tobytes()) + 100
  data[middle] ^= damage == "flipped"
  path.write_bytes({"cut": data[:-30], "text": b"no", "empty": b""}.get(damage, data))
  with pytest.raises(UserError, match="is no .npz, or damaged") as caught:
    npz.build(path=str(path))
  assert str(path) in str(caught.value)


def test_a_damaged_archive_is_named(tmp_path):
  path = tmp_path / "data.npz"
  np.savez_compressed(path, IMAGES)
  data = bytearray(path.read_bytes())
  name, extra = data[26] + 256 * data[27], data[28] + 256 * data[29]
  data[30 + name + extra] = 255  # behind the header: a block of no known type
  path.write_bytes(data)
  with pytest.raises(UserError, match="is no .npz, or damaged .*decompressing"):
    npz.build(path=str(path))


def test_one_bare_array_is_refused(tmp_path):
  np.save(tmp_path / "a.npy", IMAGES)
  with pytest.raises(UserError, match=r"a\.npy is one bare array: save it by np.savez"):
    npz.build(path=str(tmp_path / "a.npy"))


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(ValueError, match="path='': name an .npz"):
    npz.build()
  with pytest.raises(ValueError, match=r"path='.*a.npz': does not exist"):
    npz.build(path=str(tmp_path / "a.npz"))
  with pytest.raises(UserError, match="is a folder without index.npz: name an .npz"):
    npz.build(path=str(tmp_path))
