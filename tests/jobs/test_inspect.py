"""The job that shows and measures a data set."""

import re

import numpy as np
import pytest
from PIL import Image

from sdiff_jax import config as configs
from sdiff_jax import registry
from sdiff_jax.jobs import inspect
from sdiff_jax.types import UserError

RNG = np.random.default_rng(0)
CELL, GAP = 32, 2  # pixels of the picture


def experiment(tmp_path, images, labels=None, **fields):
  """Returns the config of a data set of these images."""
  path = tmp_path / "data.npz"
  arrays = {"images": images} | ({} if labels is None else {"labels": labels})
  np.savez(path, **arrays)
  config = configs.base()
  config.data = configs.component("data", "npz", path=str(path), **fields)
  return config


def cell(tmp_path, row: int, column: int) -> np.ndarray:
  """Returns one image of the picture, of 32 pixels."""
  y, x = row * (CELL + GAP), column * (CELL + GAP)
  with Image.open(tmp_path / "run" / "inspect.png") as picture:
    return np.asarray(picture)[y : y + CELL, x : x + CELL]


def test_it_is_a_job():
  assert "inspect" in registry.names("jobs")


def test_the_numbers_are_those_of_the_images(tmp_path, capsys):
  images = RNG.integers(0, 256, (300, 4, 6, 3), dtype=np.uint8)
  images[..., 1] //= 2
  labels = np.repeat([0, 1, 3], [150, 140, 10])
  config = experiment(tmp_path, images, labels, mean=(0.1, 0.2, 0.3), std=(0.6,))
  line = inspect.run(config, str(tmp_path / "run"))
  assert line == f"inspected 300 images: {tmp_path}/run/inspect.png"
  printed = capsys.readouterr().out.splitlines()
  assert printed[0] == "300 images of 4 x 6 x 3, 4 classes of 0 to 150 images"
  pixels = images.reshape(-1, 3) / 127.5 - 1
  x0 = (pixels - [0.1, 0.2, 0.3]) * 0.5 / 0.6
  for channel in range(3):
    mean, std = x0[:, channel].mean(), x0[:, channel].std()
    assert printed[1 + channel] == (
      f"x0, channel {channel}: mean {mean:.3f}, should be 0; "
      f"std {std:.3f}, should be sigma_d = 0.5"
    )
  assert printed[4] == "config.data:          mean=(0.1, 0.2, 0.3), std=(0.6,)"
  mean, std = (tuple(m.round(3).tolist()) for m in (pixels.mean(0), pixels.std(0)))
  assert printed[5] == f"better, as measured: mean={mean}, std={std}"


def test_classes_without_images_are_counted(tmp_path, capsys):
  sizes = (0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 8, 0, 0, 0, 8)
  images = bytes(sizes) + bytes(range(256))
  (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
  labels = bytes((0, 0, 8, 1, 0, 0, 0, 4)) + bytes((0, 0, 1, 1))
  (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
  config = configs.base()
  config.data = configs.component("data", "idx", dir=str(tmp_path), classes=3)
  inspect.run(config, str(tmp_path / "run"))
  assert "3 classes of 0 to 2 images" in capsys.readouterr().out


def test_the_measured_values_scale_the_images_as_promised(tmp_path, capsys):
  images = RNG.integers(100, 200, (50, 8, 8, 1), dtype=np.uint8)
  inspect.run(experiment(tmp_path, images), str(tmp_path / "run"))
  text = capsys.readouterr().out.splitlines()[-1].partition(": ")[2].strip()
  measured = eval(f"dict({text})", {"dict": dict})
  inspect.run(experiment(tmp_path, images, **measured), str(tmp_path / "run"))
  printed = capsys.readouterr().out.splitlines()
  assert printed[0] == "50 images of 8 x 8 x 1"
  numbers = re.search(
    "mean (.*), should be 0; std (.*), should be sigma_d", printed[1]
  ).groups()
  assert [float(n) for n in numbers] == pytest.approx([0, 0.5], abs=0.002)


def test_columns_are_classes_and_missing_images_are_black(tmp_path):
  labels = np.array([2, 0, 2, 0, 0, 2])
  images = np.zeros((6, 32, 32, 3), np.uint8) + (50 + np.arange(6)[:, None, None, None])
  config = experiment(tmp_path, images.astype(np.uint8), labels)
  inspect.run(config, str(tmp_path / "run"))
  shown = [[np.unique(cell(tmp_path, r, c)).tolist() for c in range(3)] for r in (0, 2)]
  assert shown == [[[51], [0], [50]], [[54], [0], [55]]]
  assert (cell(tmp_path, 3, 0) == 0).all()


@pytest.mark.parametrize("classes", [0, 1, 11])
def test_other_numbers_of_classes_fill_rows_of_ten(tmp_path, classes):
  images = RNG.integers(0, 256, (250, 32, 32, 3), dtype=np.uint8)
  labels = np.arange(250) % classes if classes else None
  inspect.run(experiment(tmp_path, images, labels), str(tmp_path / "run"))
  for k in (0, 9, 10, 99):  # spread over the whole data set, the network's view decoded
    np.testing.assert_array_equal(
      cell(tmp_path, *divmod(k, 10)), images[k * 250 // 100]
    )


def test_a_data_set_that_cannot_be_read_is_refused(tmp_path):
  config = experiment(tmp_path, RNG.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
  config.data = configs.component("data", "folder", dir=str(tmp_path / "images"))
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "bad.png").write_text("no image")
  with pytest.raises(UserError, match=r"bad\.png cannot be read"):
    inspect.run(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
