"""Jobs that are stopped in the middle resume from their state, with equal results."""

import json

import jax
import numpy as np
import optax
import pytest
from conftest import FIXTURES

from sdiff_jax import config as configs
from sdiff_jax.data import digits
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.io import snapshot
from sdiff_jax.jobs import encode, evaluate, features, statistics
from sdiff_jax.metrics.features import classifier
from sdiff_jax.metrics.statistics import reference_statistics
from sdiff_jax.training import state
from sdiff_jax.training.checkpoints import Checkpoints


class Stop(Exception):
  """Stands for a kill."""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
  monkeypatch.setattr(reference_statistics, "FOLDER", str(tmp_path / "references"))


@pytest.fixture
def stop(monkeypatch):
  """(job, config, workdir, saves) -> runs the job until it has saved so often."""
  monkeypatch.setattr(snapshot, "SECONDS", 0.0)
  monkeypatch.setattr(snapshot, "FRACTION", 1e9)
  save = snapshot.Snapshot.save

  def call(job, config, workdir, saves):
    number = 0

    def stopping(self, *args, **options):
      nonlocal number
      save(self, *args, **options)
      number += 1
      if number == saves:
        raise Stop

    with monkeypatch.context() as patch:
      patch.setattr(snapshot.Snapshot, "save", stopping)
      with pytest.raises(Stop):
        job.run(config, str(workdir))
    assert list(workdir.parent.glob("**/*partial.npz"))

  return call


@pytest.fixture(scope="module")
def images() -> np.ndarray:
  return digits.build()[np.arange(1797)]


def given_images(tmp_path, images):
  np.savez(tmp_path / "real.npz", images[0][:900])
  np.savez(tmp_path / "fake.npz", images[0][900:])
  config = configs.base()
  config.data = configs.component("data", "npz", path=str(tmp_path / "real.npz"))
  config.evaluate.update(images=str(tmp_path / "fake.npz"), batch_size=8)
  return config


def test_given_images(tmp_path, images, stop):
  config = given_images(tmp_path, images)
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  # The reference is stopped after one chunk of 64 images, then the images after five.
  for saves in (1, 20):
    stop(evaluate, config, stopped, saves)
  evaluate.run(config, str(stopped))
  evaluate.run(config, str(whole))
  rows = [(f / "evaluate" / "images.json").read_text() for f in (stopped, whole)]
  assert rows[0] == rows[1]
  assert not list(tmp_path.glob("**/*partial*"))


def test_statistics(tmp_path, images, stop):
  config = given_images(tmp_path, images)
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  for saves in (3, 4):
    stop(statistics, config, stopped, saves)
  for workdir in (stopped, whole):
    statistics.run(config, str(workdir))
  with np.load(whole / "statistics.npz") as a, np.load(stopped / "statistics.npz") as b:
    assert a.files == b.files
    for name in a.files:
      np.testing.assert_array_equal(a[name], b[name])
  assert [p.name for p in stopped.iterdir()] == ["statistics.npz"]


@pytest.mark.slow
def test_samplers(tmp_path, stop):
  config = configs.base()
  config.model = configs.component("models", "mlp", width=16, depth=1)
  config.evaluate.update(
    samplers=("ddim/2", "heun/2"),
    num=40,
    batch_size=16,
    pr_num_images=30,
    baselines=True,
  )
  runs = [tmp_path / name for name in ("whole", "stopped")]
  for workdir in runs:
    workdir_lib.save_or_check_config(config, str(workdir), digits.build())
    params = experiments.build(config).network.init(jax.random.key(0))
    with Checkpoints(str(workdir)) as checkpoints:
      profiles = tuple(config.ema.profiles)
      checkpoints.save(1, state.create(params, optax.identity(), profiles))
  # Within the reference, after the baselines, and within either sampler.
  for saves in (2, 24, 3, 2):
    stop(evaluate, config, runs[1], saves)
  rows = []
  for workdir in runs:
    evaluate.run(config, str(workdir))
    rows.append(json.loads((workdir / "evaluate" / "results.json").read_text()))
    for row in rows[-1]:
      assert (row.pop("images_per_second") is None) == (row["grid"] is None)
  assert rows[0] == rows[1]
  assert [row["sampler"] for row in rows[0]][2:] == ["ddim/2", "heun/2"]
  grids = [sorted((f / "evaluate").glob("*.png")) for f in runs]
  assert len(grids[0]) == 2
  for a, b in zip(*grids, strict=True):
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_features(tmp_path, images, stop, monkeypatch):
  np.savez(tmp_path / "data.npz", images[0][:200], images[1]["label"][:200])
  config = configs.base()
  config.data = configs.component("data", "npz", path=str(tmp_path / "data.npz"))
  fit = classifier.fit
  few = {"steps": 30, "batch_size": 8, "progress": False}
  monkeypatch.setattr(classifier, "fit", lambda *a, **more: fit(*a, **few, **more))
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  stop(features, config, stopped, 1)
  lines = [features.run(config, str(f)).partition(":")[0] for f in (stopped, whole)]
  assert lines[0] == lines[1]
  with np.load(whole / "features.npz") as a, np.load(stopped / "features.npz") as b:
    for name in a.files:
      np.testing.assert_array_equal(a[name], b[name])
  assert [p.name for p in stopped.iterdir()] == ["features.npz"]


@pytest.mark.slow
def test_encode(tmp_path, stop):
  pixels = np.random.default_rng(0).integers(0, 256, (21, 16, 16, 3), dtype=np.uint8)
  np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(21) % 3)
  config = configs.base()
  config.data = configs.component("data", "npz", path=str(tmp_path / "images.npz"))
  config.vae = str(FIXTURES / "tiny-sd2")
  config.encode.update(batch_size=8, shard_size=16)
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  for saves in (1, 2):
    stop(encode, config, stopped, saves)
  for workdir in (stopped, whole):
    encode.run(config, str(workdir))
  files = [{p.name: p.read_bytes() for p in f.iterdir()} for f in (stopped, whole)]
  assert files[0] == files[1]
  assert len(files[0]) == 3
