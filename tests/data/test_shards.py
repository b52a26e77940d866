"""Tars of images with classes, and reading files one after the other."""

import io
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from sdiff_jax.data import Dataset, PixelCodec, _loading, batches, shards
from sdiff_jax.io import downloads, storage
from sdiff_jax.types import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
SHARDS = (4, 1, 5, 3)


def png(image: np.ndarray) -> bytes:
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  return file.getvalue()


def write(path: pathlib.Path, members: dict[str, bytes]) -> None:
  with tarfile.open(path, "w") as tar:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


def members(numbers, classes: bool = True) -> dict[str, bytes]:
  found = {}
  for k in numbers:
    found[f"train/{k:04d}.png"] = png(IMAGES[k])
    if classes:
      found[f"train/{k:04d}.cls"] = f"{k % 3}\n".encode()
  return found


def test_tars_in_the_order_of_their_names(tmp_path):
  write(tmp_path / "b-001.tar", members(range(4, 7)))
  write(tmp_path / "a-000.tar", members(range(4)) | {"train/notes.txt": b"x"})
  dataset = shards.build(dir=str(tmp_path), image_size=8)
  assert (dataset.size, dataset.num_classes, dataset.shards) == (7, 3, (4, 3))
  order = np.array([6, 0, 5, 2])
  pixels, cond = dataset[order]
  np.testing.assert_array_equal(pixels, IMAGES[order])
  np.testing.assert_array_equal(cond["label"], order % 3)
  assert dataset.subset(order).shards == ()


def test_tars_of_a_bucket_are_copied_once(tmp_path, bucket, monkeypatch):
  monkeypatch.setattr(downloads, "FOLDER", str(tmp_path / "copies"))
  there = f"{bucket}/{tmp_path.name}"
  for name, numbers in (("a", range(4)), ("b", range(4, 7))):
    write(tmp_path / f"{name}.tar", members(numbers))
    storage.upload(str(tmp_path / f"{name}.tar"), f"{there}/{name}.tar")
  dataset = shards.build(dir=there, image_size=8)
  order = np.array([6, 0, 5])
  np.testing.assert_array_equal(dataset[order][0], IMAGES[order])
  monkeypatch.setattr(downloads, "FOLDER", str(tmp_path / "another host"))
  again = shards.build(dir=there, image_size=8)
  assert again.digest() == dataset.digest()
  storage.upload(str(tmp_path / "a.tar"), f"{there}/b.tar")
  assert shards.build(dir=there, image_size=8).digest() != dataset.digest()


def test_images_without_classes(tmp_path):
  write(tmp_path / "a.tar", members(range(2), classes=False))
  dataset = shards.build(dir=str(tmp_path), image_size=8)
  assert dataset.num_classes == 0
  assert dataset[np.array([1])][1] == {}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (members(range(2)) | {"train/9.png": png(IMAGES[0])}, "no class of train/9.png"),
    ({"0.png": png(IMAGES[0]), "0.cls": b"cat"}, "is damaged"),
    ({"0.png": png(IMAGES[0]), "0.cls": b"-3"}, "0.cls is -3; number from 0"),
    ({"0.png": b"no image"}, "0.png cannot be read"),
  ],
)
def test_damaged_tars_are_named(tmp_path, content, message):
  write(tmp_path / "a.tar", content)
  with pytest.raises(UserError, match=message) as error:
    shards.build(dir=str(tmp_path), image_size=8)
  assert str(error.value).startswith(str(tmp_path))


def test_half_a_tar_and_none_at_all(tmp_path):
  with pytest.raises(ValueError, match="no .tar with .png"):
    shards.build(dir=str(tmp_path))
  write(tmp_path / "a.tar", members(range(4)))
  whole = (tmp_path / "a.tar").read_bytes()
  (tmp_path / "a.tar").write_bytes(whole[:700])
  with pytest.raises(UserError, match="a.tar"):
    shards.build(dir=str(tmp_path), image_size=8)


@pytest.mark.parametrize("buffer", [1, 3, 5, 100])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_has_each_sample_once_and_reads_files_in_turn(buffer, epoch):
  found = _loading.order(13, 5, epoch, SHARDS, buffer)
  np.testing.assert_array_equal(np.sort(found), np.arange(13))
  file_of = np.repeat(np.arange(4), SHARDS)
  if buffer == 1:  # files in a random order, and each of them in its own
    changes = np.flatnonzero(np.diff(file_of[found]))
    assert len(changes) == 3
    starts = [0, *(changes + 1)]
    for part in np.split(found, starts[1:]):
      np.testing.assert_array_equal(part, np.arange(part[0], part[0] + len(part)))
  # A window has only the samples that the files in their order have there.
  plain = _loading.order(13, 5, epoch, SHARDS, 1)
  for first in range(0, 13, buffer):
    window = slice(first, first + buffer)
    assert {*found[window]} == {*plain[window]}


def test_orders_differ_between_epochs_and_seeds():
  orders = [
    _loading.order(13, seed, epoch, SHARDS, 4) for seed in (0, 1) for epoch in (0, 1)
  ]
  assert len({tuple(order) for order in orders}) == 4


def numbered() -> Dataset:
  values = np.arange(13, dtype=np.uint8).reshape(-1, 1, 1, 1)
  return Dataset(
    lambda k: (values[k], {}), 13, {}, PixelCodec((1, 1, 1)), shards=SHARDS
  )


@pytest.mark.parametrize("threads", [1, 5])
def test_batches_resume_and_do_not_depend_on_threads_or_processes(threads):
  options = {"seed": 3, "batch_size": 4, "sigma_d": 0.5, "shuffle_buffer": 5}
  whole = batches(numbered(), **options)
  first = [next(whole)["x0"] for _ in range(9)]
  resumed = batches(numbered(), start=3, num_threads=threads, **options)
  for wanted in first[3:]:
    np.testing.assert_array_equal(next(resumed)["x0"], wanted)
  mine = batches(numbered(), rows=np.array([1, 3]), num_threads=threads, **options)
  np.testing.assert_array_equal(next(mine)["x0"], first[0][[1, 3]])


@pytest.mark.parametrize(("cores", "threads"), [(1, 2), (8, 8), (240, 16)])
def test_threads_follow_the_cores(monkeypatch, cores, threads):
  monkeypatch.setattr(_loading.os, "sched_getaffinity", lambda pid: {*range(cores)})
  assert _loading.default_threads() == threads
