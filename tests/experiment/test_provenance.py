"""Training goes on: for more steps, on data elsewhere, with other versions."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from test_training import small

from sdiff_jax import config as config_lib
from sdiff_jax.experiment import provenance
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import train
from sdiff_jax.types import UserError


def averages(folder: pathlib.Path):
  config = workdir_lib.read(str(folder))
  return workdir_lib.trained(config, str(folder))[1]


@pytest.mark.slow
def test_more_steps_are_the_steps_of_a_longer_run(tmp_path):
  grown, once = tmp_path / "grown", tmp_path / "once"
  config = small("diffusion")
  for steps in (2, 5):
    config.train.steps = steps
    assert train.run(config, str(grown)) == f"trained {steps} steps: {grown}"
  train.run(config, str(once))
  jax.tree.map(np.testing.assert_array_equal, averages(grown), averages(once))
  assert json.loads((grown / "training.json").read_text())["steps"] == 5
  config.train.steps = 3
  with pytest.raises(
    UserError, match=r"another experiment: train.steps \(5 there, 3 n"
  ):
    train.run(config, str(grown))


@pytest.mark.slow
def test_a_rate_that_depends_on_the_steps_is_not_prolonged(tmp_path):
  config = small("diffusion")
  config.optim.schedule = "cosine"
  train.run(config, str(tmp_path))
  config.train.steps = 5
  with pytest.raises(
    UserError, match=r"train.steps=5: the learning rate .* was trained "
  ):
    train.run(config, str(tmp_path))


@pytest.mark.slow
def test_the_same_data_may_lie_elsewhere(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
  paths = [tmp_path / name for name in ("a.npz", "moved.npz", "other.npz")]
  np.savez(paths[0], images=images)
  config, run = small("diffusion"), str(tmp_path / "run")
  config.data = config_lib.component("data", "npz", path=str(paths[0]))
  train.run(config, run)
  shutil.move(paths[0], paths[1])
  np.savez(paths[2], images=images ^ (np.arange(20) == 7)[:, None, None, None])
  config.data.path, config.train.steps = str(paths[1]), 3
  assert train.run(config, run).startswith("trained 3 steps")
  assert workdir_lib.read(run).data.path == str(paths[1])
  config.data.path = str(paths[2])
  with pytest.raises(UserError, match=r"another experiment: data.path \("):
    train.run(config, run)


@pytest.mark.slow
def test_changed_versions_are_a_warning(tmp_path, capsys):
  config = small("diffusion")
  train.run(config, str(tmp_path))
  assert "versions" not in capsys.readouterr().err
  path = tmp_path / "versions.json"
  stored = json.loads(path.read_text())
  assert stored == provenance.versions()
  assert stored["jax"] == jax.__version__
  path.write_text(json.dumps(stored | {"jax": "0.9.0", "libtpu": "0.0.1"}))
  train.run(config, str(tmp_path))
  said = capsys.readouterr().err
  assert (
    f"last start: jax (0.9.0 there, {jax.__version__} now), libtpu (0.0.1 th" in said
  )
  train.run(config, str(tmp_path))
  assert "versions" not in capsys.readouterr().err
