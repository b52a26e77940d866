"""The jobs that make features and that measure given images in them."""

import json

import numpy as np
import pytest
from PIL import Image

from sdiff_jax import config as configs
from sdiff_jax.data import digits, idx
from sdiff_jax.interfaces import UserError
from sdiff_jax.jobs import evaluate, features
from sdiff_jax.metrics import frechet, reference
from sdiff_jax.metrics.features import classifier


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
  monkeypatch.setattr(reference, "FOLDER", str(tmp_path / "references"))
  return tmp_path / "references"


@pytest.fixture(scope="module")
def images() -> np.ndarray:
  return digits.build().take(np.arange(1797))[0]


def row(config, tmp_path) -> dict:
  """Returns the one row that evaluating given images writes."""
  line = evaluate.run(config, str(tmp_path / "run"))
  path = tmp_path / "run" / "evaluate" / "images.json"
  assert line == f"measured 1 rows: {path}"
  (only,) = json.loads(path.read_text())
  return only


def test_images_of_an_npz(tmp_path, images, capsys):
  np.savez(tmp_path / "some.npz", images[:600])
  config = configs.base()
  config.evaluate.images = str(tmp_path / "some.npz")
  measured = row(config, tmp_path)
  extract = classifier.load("digits")
  a, b = (frechet.statistics(extract(x)) for x in (images[:600], images))
  assert measured["frechet"] == pytest.approx(frechet.distance(a, b), rel=1e-6)
  assert measured["images"] == 600
  assert measured["precision"] == 1
  assert "some.npz" in capsys.readouterr().out


def test_images_of_a_folder_are_the_same(tmp_path, images):
  np.savez(tmp_path / "some.npz", images[:40])
  (tmp_path / "png").mkdir()
  for i, image in enumerate(images[:40]):
    Image.fromarray(image[..., 0]).save(tmp_path / "png" / f"{i:03}.png")
  config = configs.base()
  config.evaluate.images = str(tmp_path / "some.npz")
  packed = row(config, tmp_path)
  config.evaluate.images = str(tmp_path / "png")
  loose = row(config, tmp_path)
  assert loose.pop("model") == "png"
  assert packed.pop("model") == "some.npz"
  assert loose == packed


def test_another_reference_is_measured_and_both_are_kept(tmp_path, images, folder):
  np.savez(tmp_path / "real.npz", images[900:])
  config = configs.base()
  config.evaluate.images = str(tmp_path / "real.npz")
  against_all = row(config, tmp_path)["frechet"]
  config.reference = configs.use("data", "npz", path=str(tmp_path / "real.npz"))
  assert row(config, tmp_path)["frechet"] == pytest.approx(0, abs=1e-6)
  assert against_all > 0.1
  kept = sorted(folder.iterdir())
  assert len(kept) == 2
  times = [file.stat().st_mtime_ns for file in kept]
  row(config, tmp_path)
  assert [file.stat().st_mtime_ns for file in sorted(folder.iterdir())] == times


def test_images_of_another_size_are_refused(tmp_path, images):
  np.savez(tmp_path / "large.npz", images.repeat(2, axis=1))
  config = configs.base()
  config.evaluate.images = str(tmp_path / "large.npz")
  with pytest.raises(UserError, match=r"config.evaluate.features: .* 16, 8, 1\]"):
    evaluate.run(config, str(tmp_path / "run"))


def test_features_of_ones_own_data(tmp_path, images, monkeypatch):
  labels = digits.build().take(np.arange(1797))[1]["label"]
  np.savez(tmp_path / "data.npz", images[:600], labels[:600])
  config = configs.base()
  config.data = configs.use("data", "npz", path=str(tmp_path / "data.npz"))
  fit = classifier.fit
  few = {"steps": 60, "progress": False}
  monkeypatch.setattr(classifier, "fit", lambda *args: fit(*args, **few))
  line = features.run(config, str(tmp_path / "run"))
  assert line.startswith("accuracy on 600 training images 0.")
  config.evaluate.features = line.partition(": ")[2]
  config.evaluate.images = str(tmp_path / "data.npz")
  assert row(config, tmp_path)["frechet"] == pytest.approx(0, abs=1e-6)


def test_features_need_classes(tmp_path, images):
  np.savez(tmp_path / "data.npz", images)
  config = configs.base()
  config.data = configs.use("data", "npz", path=str(tmp_path / "data.npz"))
  with pytest.raises(UserError, match="0 classes"):
    features.run(config, str(tmp_path / "run"))


def test_the_shipped_features_know_fashion():
  try:
    source = idx.build(split="test")
  except UserError:
    pytest.skip("Fashion-MNIST is not installed")
  images, cond = source.take(np.arange(2000))
  labels = cond["label"]
  with np.load(classifier.FOLDER / "fashion.npz") as arrays:
    _, logits = classifier.predict(dict(arrays), images)
  assert np.mean(logits.argmax(axis=1) == labels) > 0.88
