"""The jobs that make features and that measure given images in them."""

import json

import formula_weights
import jax
import numpy as np
import pytest
from PIL import Image

from sdiff_jax import config as configs
from sdiff_jax import registry
from sdiff_jax.data import digits, idx
from sdiff_jax.jobs import evaluate, features, statistics
from sdiff_jax.metrics import frechet, inception_score
from sdiff_jax.metrics.features import FeatureNetwork, classifier, dinov2
from sdiff_jax.metrics.statistics import reference_statistics
from sdiff_jax.types import UserError


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
  monkeypatch.setattr(reference_statistics, "FOLDER", str(tmp_path / "references"))
  return tmp_path / "references"


@pytest.fixture(scope="module")
def images() -> np.ndarray:
  return digits.build()[np.arange(1797)][0]


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
  with np.load(classifier.FOLDER / "digits.npz") as arrays:
    weights = dict(arrays)
  a, b = (
    frechet.statistics(classifier.predict(weights, x)[0])
    for x in (images[:600], images)
  )
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
  config.reference = configs.component("data", "npz", path=str(tmp_path / "real.npz"))
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


@pytest.mark.slow
def test_features_of_ones_own_data(tmp_path, images, monkeypatch):
  labels = digits.build()[np.arange(1797)][1]["label"]
  np.savez(tmp_path / "data.npz", images[:200], labels[:200])
  config = configs.base()
  config.data = configs.component("data", "npz", path=str(tmp_path / "data.npz"))
  fit = classifier.fit
  few = {"steps": 10, "progress": False}
  monkeypatch.setattr(
    classifier, "fit", lambda *args, **more: fit(*args, **few, **more)
  )
  line = features.run(config, str(tmp_path / "run"))
  assert line.startswith("accuracy on 200 training images 0.")
  config.evaluate.features = line.partition(": ")[2]
  config.evaluate.images = str(tmp_path / "data.npz")
  assert row(config, tmp_path)["frechet"] == pytest.approx(0, abs=1e-6)


def test_features_need_classes(tmp_path, images):
  np.savez(tmp_path / "data.npz", images)
  config = configs.base()
  config.data = configs.component("data", "npz", path=str(tmp_path / "data.npz"))
  with pytest.raises(UserError, match="0 classes"):
    features.run(config, str(tmp_path / "run"))


def test_the_shipped_features_know_fashion():
  try:
    source = idx.build(split="test")
  except UserError:
    pytest.skip("Fashion-MNIST is not installed")
  images, cond = source[np.arange(2000)]
  labels = cond["label"]
  with np.load(classifier.FOLDER / "fashion.npz") as arrays:
    _, logits = classifier.predict(dict(arrays), images)
  assert np.mean(logits.argmax(axis=1) == labels) > 0.88


def config_for(tmp_path, images, **fields):
  """A config that measures images against the first 900 digits."""
  np.savez(tmp_path / "fake.npz", images[1000:1400])
  np.savez(tmp_path / "real.npz", images[:900])
  config = configs.base()
  config.data = configs.component("data", "npz", path=str(tmp_path / "real.npz"))
  config.evaluate.images = str(tmp_path / "fake.npz")
  config.evaluate.update(batch_size=64, **fields)
  return config


def test_statistics_instead_of_images(tmp_path, images):
  config = config_for(tmp_path, images)
  against_images = row(config, tmp_path)
  line = statistics.run(config, str(tmp_path / "made"))
  path = tmp_path / "made" / "statistics.npz"
  assert line == f"frechet of 900 images: {path}"
  config.evaluate.reference = str(path)
  against_statistics = row(config, tmp_path)
  distance = against_images.pop("frechet")
  assert against_statistics.pop("frechet") == pytest.approx(distance, rel=1e-9)
  assert against_images.keys() - against_statistics.keys() == {"precision", "recall"}
  with np.load(path) as arrays:
    both = dict(arrays)
  np.savez(path, images[:900], **both)  # as ADM's files, which have images as well
  found = row(config, tmp_path)
  for name in ("precision", "recall"):
    assert found[name] == against_images[name]
  with pytest.raises(UserError, match="config.evaluate.reference must be empty"):
    statistics.run(config, str(tmp_path / "made"))


def test_a_folder_against_statistics(tmp_path, images):
  """The images say how large they are; they are read in color."""
  config = config_for(tmp_path, images)
  (tmp_path / "png").mkdir()
  for i, image in enumerate(images[:20]):
    Image.fromarray(image[..., 0]).save(tmp_path / "png" / f"{i:03}.png")
  config.evaluate.images = str(tmp_path / "png")
  config.evaluate.reference = str(tmp_path / "x.npz")
  np.savez(tmp_path / "x.npz", mu=np.zeros(64), sigma=np.eye(64))
  with pytest.raises(UserError, match=r"8, 8, 1\], got uint8 \[1, 8, 8, 3\]"):
    evaluate.run(config, str(tmp_path / "run"))


def test_statistics_of_another_network(tmp_path, images):
  config = config_for(tmp_path, images)
  config.evaluate.reference = str(tmp_path / "x.npz")
  np.savez(tmp_path / "x.npz", mu=np.zeros(2048), sigma=np.eye(2048))
  with pytest.raises(UserError, match="of 2048 features, frechet has 64: they are of"):
    evaluate.run(config, str(tmp_path / "run"))


@pytest.mark.slow
def test_several_networks(tmp_path, images, fixture):
  """DINOv2 from a file beside the classifier; precision is the first one's."""
  found = json.loads(str(fixture("vision_features")["meta"]))["shapes"]["hub"]
  made = {k: formula_weights.transformer(k, tuple(v)) for k, v in found.items()}
  np.savez(tmp_path / "dino.npz", **made)
  config = config_for(tmp_path, images)
  np.savez(tmp_path / "fake.npz", images[1000:1012])
  np.savez(tmp_path / "real.npz", images[:12])
  alone = row(config, tmp_path)
  config.evaluate.features = f"digits,dinov2:{tmp_path / 'dino.npz'}"
  both = row(config, tmp_path)
  net = dinov2.load(str(tmp_path / "dino.npz"))
  a, b = (
    frechet.statistics(np.asarray(jax.jit(net.apply)(net.params, x)))
    for x in (images[1000:1012], images[:12])
  )
  distance = both.pop("fd_dinov2")
  assert distance == pytest.approx(frechet.distance(a, b), rel=1e-4)
  assert both.pop("frechet") == pytest.approx(alone.pop("frechet"), rel=1e-6)
  assert both == alone


def test_the_inception_score_is_measured(tmp_path, images):
  """Of a network with a head; here one whose classes are as bright as the image."""

  def load(path):
    head = np.array([[1.0, -1.0]], np.float32)
    mean = lambda params, x: x.astype(np.float32).mean((1, 2)) - params  # noqa: E731
    return FeatureNetwork("fid", mean, np.float32(80), head)

  registry.register("metrics.features", "bright", columns={})(load)
  found = row(config_for(tmp_path, images, features="bright:x"), tmp_path)
  bright = images[1000:1400].astype(np.float64).mean((1, 2, 3)) - 80
  logits = np.stack([bright, -bright], axis=1)
  sums = inception_score.sums(logits, inception_score.splits(400))
  score = inception_score.score(sums)
  assert 1.2 < score < 2
  assert found["inception_score"] == pytest.approx(score, rel=1e-4)
  assert found["fid"] > 0


def test_two_networks_of_one_metric(tmp_path, images):
  with pytest.raises(
    UserError, match="digits,fashion: two networks have the same metric"
  ):
    evaluate.run(config_for(tmp_path, images, features="digits,fashion"), str(tmp_path))
