"""TensorFlow Datasets without TensorFlow: prepared here in ArrayRecord, then read."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from sdiff_jax.data import _tfds_files, batches, tfds
from sdiff_jax.types import UserError

RNG = np.random.default_rng(0)


def prepare(folder, images: dict, features: dict) -> None:
  """Prepares a data set `tiny`; example k has its PNG, the label k % 3 and the id k.

  TensorFlow Datasets encodes arrays by TensorFlow, but takes encoded files as they are.
  """

  core = tensorflow_datasets.core

  class Tiny(core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = core.Version("1.0.0")

    def _info(self):
      described = tensorflow_datasets.features.FeaturesDict(features)
      return core.DatasetInfo(builder=self, features=described)

    def _split_generators(self, manager):
      return {split: self._generate_examples(split) for split in images}

    def _generate_examples(self, split):
      for k, image in enumerate(images[split]):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        file.seek(0)
        example = {"image": file, "label": k % 3, "id": k}
        yield k, {key: example[key] for key in features}

  Tiny(data_dir=folder, file_format="array_record").download_and_prepare()


def features(shape=(8, 8, 3)) -> dict:
  return {
    "image": tensorflow_datasets.features.Image(shape=shape),
    "label": tensorflow_datasets.features.ClassLabel(num_classes=3),
    "id": np.int64,
  }


@pytest.fixture(scope="module")
def images():
  return {
    "train": RNG.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8),
    "test": RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8),
  }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, images):
  folder = tmp_path_factory.mktemp("tfds")
  prepare(folder, images, features())
  return str(folder)


def test_examples_are_those_that_were_prepared(prepared, images):
  source = tfds.build(tfds_name="tiny", dir=prepared)
  assert (source.size, source.shape, source.num_classes) == (12, (8, 8, 3), 3)
  read, cond = source[np.arange(12)]
  labels = cond["label"]
  assert (read.dtype, labels.dtype) == (np.uint8, np.int32)
  # They were shuffled on the way, so each is looked up among the originals.
  same = (read[:, None] == images["train"]).all((2, 3, 4))
  assert (same.sum(0) == 1).all()
  np.testing.assert_array_equal(labels, same.argmax(1) % 3)
  again, _ = source[np.array([7, 2, 7])]
  np.testing.assert_array_equal(again, read[[7, 2, 7]])


def test_splits_and_parts_of_them(prepared, images):
  test = tfds.build(tfds_name="tiny", dir=prepared, split="test")
  read, _ = test[np.arange(5)]
  assert (read[:, None] == images["test"]).all((2, 3, 4)).sum() == 5
  part = tfds.build(tfds_name="tiny:1.0.0", dir=prepared, split="train[4:]")
  whole = tfds.build(tfds_name="tiny", dir=prepared)
  assert part.size == 8
  np.testing.assert_array_equal(part[np.arange(8)][0], whole[np.arange(4, 12)][0])


def test_batches_over_several_epochs(prepared):
  source = tfds.build(tfds_name="tiny", dir=prepared, mean=(0.0,), std=(0.5,))
  loader = batches(source, seed=0, batch_size=6, sigma_d=0.5)
  epochs = [np.concatenate([next(loader)["x0"] for _ in range(2)]) for _ in range(2)]
  one, two = (np.sort(e.reshape(12, -1), axis=0) for e in epochs)
  np.testing.assert_array_equal(one, two)
  assert (epochs[0] != epochs[1]).any()


def test_images_of_many_sizes_are_cropped_and_need_a_size(tmp_path):
  wide, tall = np.full((8, 14, 3), 7, np.uint8), np.full((9, 8, 3), 9, np.uint8)
  wide[:, 3:11] = 50
  shapes = features((None, None, 3))
  prepare(tmp_path, {"train": [wide, tall]}, shapes)
  with pytest.raises(ValueError, match="image_size=0: .* differ in size"):
    tfds.build(tfds_name="tiny", dir=str(tmp_path))
  source = tfds.build(tfds_name="tiny", dir=str(tmp_path), image_size=8)
  assert source.shape == (8, 8, 3)
  read, _ = source[np.arange(2)]
  assert sorted(np.unique(read).tolist()) == [9, 50]


def test_grey_images_without_labels(tmp_path):
  grey = RNG.integers(0, 256, (3, 8, 8), dtype=np.uint8)
  image = tensorflow_datasets.features.Image(shape=(8, 8, 1))
  prepare(tmp_path, {"train": grey}, {"image": image})
  build = {"tfds_name": "tiny", "dir": str(tmp_path)}
  with pytest.raises(ValueError, match=r"mean=.*: the images have 1 channel"):
    tfds.build(**build)
  source = tfds.build(**build, mean=(0.0,), std=(0.5,))
  assert (source.size, source.shape, source.num_classes) == (3, (8, 8, 1), 0)
  read, cond = source[np.arange(3)]
  assert (read[:, None, ..., 0] == grey).all((2, 3)).sum() == 3
  assert cond == {}


def test_what_was_not_prepared_says_how_to_prepare_it(prepared, tmp_path):
  with pytest.raises(ValueError, match="is not below") as caught:
    tfds.build(dir=str(tmp_path))
  message = str(caught.value)
  assert f"tfds_name='cifar10': is not below dir='{tmp_path}'" in (message)
  assert f"`tfds build cifar10 --data_dir={tmp_path} --file_format=array_record`" in (
    message
  )
  with pytest.raises(ValueError, match="'tiny:2.0.0': is not below"):
    tfds.build(tfds_name="tiny:2.0.0", dir=prepared)


def test_files_without_random_access_are_refused(prepared, tmp_path):
  # Only TensorFlow writes tfrecord files; what describes them is a line.
  target = tmp_path / "tiny" / "1.0.0"
  target.mkdir(parents=True)
  for name in ("dataset_info.json", "features.json"):
    text = pathlib.Path(prepared, "tiny", "1.0.0", name).read_text("utf-8")
    (target / name).write_text(text.replace("array_record", "tfrecord"))
  with pytest.raises(ValueError, match="is tfrecord, which has no random access"):
    tfds.build(tfds_name="tiny", dir=str(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_damaged_files_are_named(prepared, tmp_path, damage):
  shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / "tiny" / "1.0.0"
  (file,) = folder.glob("*train.array_record*")
  data = file.read_bytes()
  file.write_bytes({"empty": b""}.get(damage, data[: len(data) // 2]))
  if damage == "missing":
    file.unlink()
  with pytest.raises(UserError, match=r"cannot be read .*; remove it and prepare") as e:
    tfds.build(tfds_name="tiny", dir=str(tmp_path))
  assert str(e.value).startswith(str(folder))


def test_fields_that_do_not_fit_are_refused(prepared, tmp_path):
  def refuses(match, **fields):
    with pytest.raises(ValueError, match=match):
      tfds.build(**{"tfds_name": "tiny", "dir": prepared} | fields)

  refuses("split='valid': use one of .*train", split="valid")
  refuses(r"split='train\[:0\]': use one of", split="train[:0]")
  refuses("image_size=-8: must be from 0 to 8192", image_size=-8)
  refuses(r"std=\(0.0,\): must be .*above 0", std=(0.0,))
  empty = {"train": [np.zeros((8, 8, 3), np.uint8)]}
  prepare(tmp_path, empty, {"id": np.int64})
  refuses("has no gray or RGB feature `image`, only id", dir=tmp_path)


@pytest.fixture
def copied(prepared, tmp_path):
  """A copy of the data set, whose files may be changed."""
  shutil.copytree(pathlib.Path(prepared, "tiny"), tmp_path / "tiny")
  return tmp_path / "tiny" / "1.0.0"


def refuses(copied, match: str) -> str:
  with pytest.raises(UserError, match=match) as error:
    tfds.build(tfds_name="tiny", dir=str(copied.parents[1]))
  line = str(error.value)
  assert line.startswith(str(copied))
  assert "\n" not in line
  assert len(line) < 500
  return line


def edited(path: pathlib.Path, change) -> None:
  value = json.loads(path.read_text())
  change(value)
  path.write_text(json.dumps(value))


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_no_module_is_imported_that_a_file_names(copied, tmp_path, monkeypatch, key):
  (tmp_path / "harmful_module.py").write_text("open('was_run', 'w').close()")
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  for name in ("harmful_module.Image", "this.Image", "x" * 10_000 + ".Image"):

    def change(value, name=name):
      image = value["featuresDict"]["features"]["image"]
      image.pop("pythonClassName", None)
      image[key] = name
      image["content"] = {}

    edited(copied / "features.json", change)
    refuses(copied, "features.json: the feature type .* is not read")
  assert not (tmp_path / "was_run").exists()
  assert "harmful_module" not in sys.modules


def test_types_of_features_are_those_of_the_package():
  registered = tensorflow_datasets.features.FeatureConnector._registered_features
  assert {*registered} >= _tfds_files.TYPES


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize(
  "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 10**5, b'{"a": 1}', b"{}"]
)
def test_damaged_descriptions_are_refused(copied, name, content):
  (copied / name).write_bytes(content)
  refuses(copied, name if b"}" not in content else "tiny")


def test_descriptions_that_lie_are_refused(copied):
  path = copied / "features.json"
  good = path.read_text()

  def features(value):
    return value["featuresDict"]["features"]

  def classes(value):
    features(value)["label"]["classLabel"]["numClasses"] = str(2**40)

  edited(path, classes)
  refuses(copied, "the feature label has 1099511627776 classes")
  path.write_text(good)

  def dimensions(value):
    features(value)["image"]["image"]["shape"]["dimensions"] = ["9", "8", "3"]

  edited(path, dimensions)
  refuses(copied, r"an image is \(8, 8, 3\) and not \(9, 8, 3\)")
  path.write_text(good)
  path = copied / "dataset_info.json"
  good = path.read_text()
  for lengths in (["9" * 30], [-1], ["x"], [str(10**11)]):
    edited(path, lambda value, n=lengths: value["splits"][0].update(shardLengths=n))
    refuses(copied, "shardLengths|cannot be read")
    path.write_text(good)
  template = "../../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
  edited(path, lambda value: value["splits"][0].update(filepathTemplate=template))
  refuses(copied, "leads out of the folder")
  path.write_text(good)
  edited(path, lambda value: value.update(unknown=3))
  refuses(copied, "cannot be read")


def test_a_pipe_beside_the_files_is_refused(copied):
  os.mkfifo(copied / "label.labels.txt")
  refuses(copied, "is a named pipe, not a regular file")


def test_labels_beyond_the_classes_are_refused(copied):
  def classes(value):
    value["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = "1"

  edited(copied / "features.json", classes)
  with pytest.raises(UserError, match="a label is beyond the 1 classes"):
    tfds.build(tfds_name="tiny", dir=str(copied.parents[1]))[np.arange(12)]


def test_names_of_data_sets(prepared):
  with pytest.raises(ValueError, match="must be NAME"):
    tfds.build(tfds_name="../tiny", dir=prepared)
  with pytest.raises(ValueError, match="must be NAME"):
    tfds.build(tfds_name="x" * 10_000 + " ", dir=prepared)


def test_the_digest_changes_with_the_files(copied):
  def digest() -> bytes:
    return tfds.build(tfds_name="tiny", dir=str(copied.parents[1])).digest()

  first = digest()
  assert digest() == first
  (file,) = copied.glob("tiny-train*")
  os.utime(file, ns=(0, 1))
  assert digest() != first


def test_tensorflow_is_never_imported(prepared):
  code = (
    "import sys, numpy; from sdiff_jax.data import tfds;"
    "assert 'tensorflow_datasets' not in sys.modules;"
    f"s = tfds.build(tfds_name='tiny', dir={prepared!r}); s[numpy.arange(3)];"
    "assert 'tensorflow_datasets' in sys.modules;"
    "assert not {'tensorflow', 'torch'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
