"""Images in Parquet files as the Hugging Face Hub stores them, on disks and in buckets."""

import io
import json
import threading

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from sdiff_jax import registry
from sdiff_jax.data import _parquet_files, batches, parquet
from sdiff_jax.io import file_io
from sdiff_jax.types import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
TEXTS = ["a cat", "two  dogs\n", "", "a cat", "x", "y", "z"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(image: np.ndarray) -> bytes:
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  return file.getvalue()


def images(rows) -> pa.Array:
  return pa.array([{"bytes": png(IMAGES[k]), "path": None} for k in rows], IMAGE)


def packed(table: pa.Table, **options) -> bytes:
  file = io.BytesIO()
  pq.write_table(table, file, **options)
  return file.getvalue()


def write(folder, name: str, rows, *, classes: int = 0, group: int = 2, **columns):
  """Writes a file of images with labels, as the library `datasets` does."""
  rows = [*rows]
  values = {"image": images(rows), "label": pa.array([k % 3 for k in rows])} | columns
  table = pa.table({k: v for k, v in values.items() if v is not None})
  if classes:
    feature = {"names": [str(k) for k in range(classes)], "_type": "ClassLabel"}
    about = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
  file_io.write_bytes(f"{folder}/{name}", packed(table, row_group_size=group))


def two_files(folder, **options) -> None:
  write(folder, "train-00001-of-00002.parquet", range(4, 7), **options)
  write(folder, "train-00000-of-00002.parquet", range(4), **options)
  write(folder, "test-00000-of-00001.parquet", range(2), **options)


@pytest.mark.parametrize("classes", [0, 5])
def test_files_of_a_split_in_the_order_of_their_names(tmp_path, classes):
  two_files(tmp_path, classes=classes)
  dataset = parquet.build(dir=str(tmp_path), image_size=8)
  assert (dataset.size, dataset.shards) == (7, (4, 3))
  assert dataset.num_classes == (classes or 3)
  order = np.array([6, 0, 5, 2, 3])
  pixels, cond = dataset[order]
  np.testing.assert_array_equal(pixels, IMAGES[order])
  np.testing.assert_array_equal(cond["label"], order % 3)
  assert dataset.captions is None
  assert parquet.build(dir=str(tmp_path), split="test", image_size=8).size == 2
  assert parquet.build(dir=str(tmp_path), split="", image_size=8).size == 9
  again = parquet.build(dir=str(tmp_path), image_size=8)
  assert again.digest() == dataset.digest()


def test_captions_and_bytes_without_a_struct(tmp_path):
  plain = pa.array([png(image) for image in IMAGES])
  write(tmp_path, "train.parquet", range(7), image=plain, label=None, text=TEXTS)
  dataset = parquet.build(dir=str(tmp_path), image_size=8)
  assert dataset.cond == {}
  order = np.array([1, 6, 0, 2])
  assert dataset.captions(order) == ["two dogs", "z", "a cat", ""]
  np.testing.assert_array_equal(dataset[order][0], IMAGES[order])


def test_columns_by_name(tmp_path):
  fine = pa.array([k % 2 for k in range(7)], pa.uint8())
  write(
    tmp_path, "train.parquet", range(7), mask=images(range(7)), fine=fine, alt=TEXTS
  )
  with pytest.raises(ValueError, match=r"^image_column='': must be an image column;"):
    parquet.build(dir=str(tmp_path))
  named = {"image_column": "mask", "label_column": "fine", "caption_column": "alt"}
  dataset = parquet.build(dir=str(tmp_path), image_size=8, **named)
  assert dataset.num_classes == 2
  assert dataset.captions(np.array([4])) == ["x"]


def test_a_bucket_is_read_where_it_lies(bucket, tmp_path):
  for folder in (f"{bucket}/parquet", str(tmp_path)):
    two_files(folder)
  there, here = (
    registry.build("data", {"name": "parquet", "dir": folder, "image_size": 8})
    for folder in (f"{bucket}/parquet", str(tmp_path))
  )
  options = {"seed": 3, "batch_size": 4, "sigma_d": 0.5, "shuffle_buffer": 3}
  whole = batches(here, **options)
  first = [next(whole) for _ in range(4)]
  resumed = batches(there, start=2, num_threads=3, **options)
  for wanted in first[2:]:
    found = next(resumed)
    np.testing.assert_array_equal(found["x0"], wanted["x0"])
    np.testing.assert_array_equal(found["cond"]["label"], wanted["cond"]["label"])
  assert there.digest() == there.digest() != here.digest()


@pytest.mark.parametrize(
  ("columns", "message"),
  [
    ({"label": [0, -1]}, "a label is -1; number them from 0"),
    ({"label": pa.array([2**64 - 1] * 2, pa.uint64())}, "a label is 46116"),
    ({"image": [b"no image", b""]}, "row 0: the image cannot be read (it is no PNG"),
    ({"image": pa.array([None, None], pa.binary())}, "row 0: the image cannot be read"),
  ],
)
def test_damaged_rows_are_named(tmp_path, columns, message):
  write(tmp_path, "train-0.parquet", range(2), **columns)
  with pytest.raises(UserError) as error:
    parquet.build(dir=str(tmp_path), image_size=8)
  assert message in str(error.value)
  assert str(error.value).startswith(str(tmp_path))


def test_a_class_beyond_the_named_ones_is_refused_when_it_is_read(tmp_path):
  write(tmp_path, "train.parquet", range(7), classes=2)
  with pytest.raises(UserError, match=r"train.parquet: row 5: the label is 2 of 2"):
    parquet.build(dir=str(tmp_path), image_size=8)[np.array([4, 5])]


@pytest.mark.parametrize(
  ("prepare", "message"),
  [
    (lambda folder: folder.rmdir(), "is not a folder; name one of files .parquet"),
    (lambda folder: None, "no .parquet files; name the folder that has them"),
    (
      lambda folder: write(folder, "test-0.parquet", range(2)),
      "no files train-*.parquet; there is test-0.parquet: name another split",
    ),
    (lambda folder: write(folder, "train-0.parquet", ()), "its files have no rows"),
  ],
)
def test_folders_that_are_refused(tmp_path, prepare, message):
  folder = tmp_path / "data"
  folder.mkdir()
  prepare(folder)
  with pytest.raises(ValueError, match="^dir=") as error:
    parquet.build(dir=str(folder))
  assert message in str(error.value)


def test_files_of_other_columns_and_half_a_file_are_refused(tmp_path):
  two_files(tmp_path)
  path = tmp_path / "train-00001-of-00002.parquet"
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match=r"00001-of-00002.parquet is damaged \("):
    parquet.build(dir=str(tmp_path))
  write(tmp_path, path.name, range(3), label=None)
  with pytest.raises(UserError, match="has other columns than"):
    parquet.build(dir=str(tmp_path))


def test_a_group_is_read_once_for_all_threads_and_the_latest_are_kept():
  reads, gate = [], threading.Event()

  def read(key: str) -> tuple[str, int]:
    reads.append(key)
    gate.wait()
    return key.upper(), 4

  cache = _parquet_files._Cache(read, max_bytes=8)
  found: list[str] = []
  threads = [threading.Thread(target=lambda: found.append(cache["a"])) for _ in "123"]
  for thread in threads:
    thread.start()
  gate.set()
  for thread in threads:
    thread.join()
  assert (found, reads) == (["A"] * 3, ["a"])
  assert [cache[k] for k in "bacab"] == [*"BACAB"]  # c takes the place of b
  assert reads == [*"abcb"]


def test_an_error_of_a_read_is_not_kept():
  answers = iter([ValueError("once"), ("x", 1)])

  def read(key: str) -> tuple[str, int]:
    if isinstance(answer := next(answers), Exception):
      raise answer
    return answer

  cache = _parquet_files._Cache(read, max_bytes=8)
  with pytest.raises(ValueError, match="once"):
    cache["a"]
  assert cache["a"] == "x"
