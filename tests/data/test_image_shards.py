"""Images in many .npz files, as a data set."""

import numpy as np
import pytest

from sdiff_jax.data import image_shards, npz
from sdiff_jax.types import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
LABELS = np.array([4, 0, 1, 1, 0, 2, 3])
SHARD = np.array([1, 1, 0, 0, 0, 2, 1])
ROW = np.array([2, 0, 1, 0, 2, 3, 1])


def write(folder, images=IMAGES, labels=LABELS, shard=SHARD, row=ROW) -> None:
  for k in range(3):
    rows = np.zeros((4, *IMAGES.shape[1:]), np.uint8)
    rows[ROW[k == SHARD]] = images[k == SHARD]
    np.savez(folder / f"{k}.npz", images=rows)
  names = ["0.npz", "1.npz", "2.npz"]
  index = image_shards.Index(names, shard, row, labels, IMAGES.shape[1:])
  image_shards.write(str(folder), index)


def test_every_order_of_indices(tmp_path):
  write(tmp_path)
  source = npz.build(path=str(tmp_path))
  assert (source.size, source.shape, source.num_classes) == (7, (4, 6, 3), 5)
  order = np.array([6, 0, 0, 3, 5])
  images, cond = source[order]
  np.testing.assert_array_equal(images, IMAGES[order])
  np.testing.assert_array_equal(cond["label"], LABELS[order])


def test_the_fingerprint_is_that_of_the_content(tmp_path):
  folders = [tmp_path / name for name in ("a", "b", "c")]
  for folder in folders:
    folder.mkdir()
  write(folders[0])
  write(folders[1])
  write(folders[2], IMAGES ^ (np.arange(7) == 3).astype(np.uint8)[:, None, None, None])
  a, b, c = (npz.build(path=str(folder)).digest() for folder in folders)
  assert a == b
  assert a != c


def test_no_classes(tmp_path):
  write(tmp_path, labels=np.full(7, -1))
  assert npz.build(path=str(tmp_path))[np.arange(2)][1] == {}


def test_damaged_indices_are_refused(tmp_path):
  with pytest.raises(UserError, match="is a folder without index.npz: name an .npz"):
    npz.build(path=str(tmp_path))
  for change in ({"shard": SHARD + 1}, {"row": ROW - 1}, {"labels": LABELS[:3]}):
    write(tmp_path, **change)
    with pytest.raises(UserError, match="is no index of images"):
      npz.build(path=str(tmp_path))
  write(tmp_path, row=ROW + 1)
  source = npz.build(path=str(tmp_path))
  with pytest.raises(UserError, match="index.npz is not that of its files"):
    source[np.arange(7)]
  (tmp_path / "1.npz").unlink()
  write(tmp_path)
  (tmp_path / "1.npz").unlink()
  with pytest.raises(UserError, match="1.npz does not exist"):
    npz.build(path=str(tmp_path))[np.array([1])]
