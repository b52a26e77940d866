"""From a config to a trainer: initial weights and teachers are two things."""

import json
import sys

import jax
import numpy as np
import pytest

from sdiff_jax import config as config_lib
from sdiff_jax.experiment import build, checks, teachers, training
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import train
from sdiff_jax.types import UserError


def small(loss: str, **fields):
  config = config_lib.base()
  config.model = config_lib.component("models", "mlp", width=8, depth=1)
  config.loss = config_lib.component("losses", loss, **fields)
  config.train.update(steps=2, batch_size=8, log_every=1)
  return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
  folder = str(tmp_path_factory.mktemp("teacher"))
  train.run(small("diffusion"), folder)
  return folder


def averages(config, folder):
  return workdir_lib.trained(config, folder)[1]


@pytest.mark.parametrize("loss", ["scm", "consistency"])
@pytest.mark.slow
def test_consistency_training_from_random_weights(loss, tmp_path):
  config = small(loss, velocity="data")
  assert train.run(config, str(tmp_path)) == f"trained 2 steps: {tmp_path}"
  assert workdir_lib.parent(workdir_lib.read(str(tmp_path))) == ""


@pytest.mark.parametrize(
  "velocity", [pytest.param("data", marks=pytest.mark.slow), "teacher"]
)
def test_training_starts_from_the_averaged_weights(velocity, teacher, tmp_path):
  config = small("scm", velocity=velocity)
  config.init_from = teacher
  config.teacher.workdir = teacher if velocity == "teacher" else ""
  config.optim.learning_rate = 1e-12
  train.run(config, str(tmp_path))
  start, end = averages(config, teacher), averages(config, str(tmp_path))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), start["net"], end["net"]
  )
  assert workdir_lib.parent(workdir_lib.read(str(tmp_path))) == teacher


@pytest.mark.slow
def test_distillation_into_random_weights(teacher, tmp_path):
  config = small("scm", velocity="teacher")
  config.teacher.workdir, config.seed = teacher, 1
  config.optim.learning_rate = 1e-12
  train.run(config, str(tmp_path))
  start, end = averages(config, teacher), averages(config, str(tmp_path))
  differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start, end)
  assert max(jax.tree.leaves(differences["net"])) > 0.01


@pytest.mark.slow
def test_an_autoguided_teacher_moves_away_from_a_worse_network(teacher, tmp_path):
  weak = small("diffusion")
  weak.model.width, weak.seed = 4, 1
  train.run(weak, str(tmp_path / "weak"))
  config = small("flow_map", velocity="teacher")
  config.teacher.workdir = config.init_from = teacher
  experiment = build.build(config)
  plain, plain_params = teachers.load_teacher(config, experiment)
  step = training.run_flops(config, experiment)
  config.teacher.update(weak_workdir=str(tmp_path / "weak"), autoguidance=3.0)
  network, params = teachers.load_teacher(config, experiment)
  worse = build.build(weak).network
  x, t = np.ones((2, 8, 8, 1), np.float32), np.array([0.3, 1.2], np.float32)
  label = {"label": np.array([1, 7])}
  F = plain.apply(plain_params, x, t, label)
  F_weak = worse.apply(params[teachers.WEAK], x, t, label)
  expected = 3 * F - 2 * F_weak
  np.testing.assert_allclose(network.apply(params, x, t, label), expected, atol=1e-5)
  assert np.abs(expected - F).max() > 0.01
  assert training.run_flops(config, experiment) > step
  train.run(config, str(tmp_path / "student"))
  assert workdir_lib.parent(workdir_lib.read(str(tmp_path / "student"))) == teacher
  config.teacher.weak_workdir = ""
  message = r"config\.teacher\.autoguidance=3\.0: needs the worse network"
  with pytest.raises(UserError, match=message):
    train.run(config, str(tmp_path / "other"))


def test_work_directories_of_earlier_versions_read_well(teacher, tmp_path):
  """There, teacher.workdir was both the teacher and the source of the weights."""
  for velocity in ("data", "teacher"):
    stored = small("scm", velocity=velocity).to_dict()
    del stored["init_from"]
    stored["teacher"]["workdir"] = teacher
    folder = tmp_path / velocity
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(stored))
    config = workdir_lib.read(str(folder))
    assert config.init_from == teacher
    assert config.teacher.workdir == (teacher if velocity == "teacher" else "")


@pytest.mark.parametrize(
  ("fields", "changed", "message"),
  [
    (
      {"velocity": "teacher"},
      {},
      "config.teacher.workdir is empty: name the run to distill, trained by: python",
    ),
    (
      {"velocity": "teacher"},
      {"teacher.workdir": "nowhere"},
      "config.teacher.workdir=nowhere: no run there; train it first: python -m",
    ),
    (
      {"velocity": "data"},
      {"teacher.workdir": "nowhere"},
      "config.teacher.workdir=nowhere: config.loss distills no teacher; .*init_from",
    ),
    (
      {"velocity": "data"},
      {"init_from": "nowhere"},
      "config.init_from=nowhere: no run",
    ),
    (
      {"velocity": "both"},
      {},
      r"config\.loss\.velocity='both': must be one of teacher, data",
    ),
    (
      {"velocity": "data"},
      {"optim.name": "sgd"},
      r"config\.optim\.name='sgd': must be",
    ),
    (
      {"velocity": "data"},
      {"ema.profiles": ("power",)},
      r"config\.ema\.profiles: 'power' is not of the form",
    ),
  ],
)
def test_mistakes_are_refused(fields, changed, message, tmp_path):
  config = small("scm", **fields)
  config.update_from_flattened_dict(changed)
  with pytest.raises(UserError, match=message):
    train.run(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_weights_of_other_data_and_networks_are_refused(teacher, tmp_path):
  config = small("scm", velocity="data")
  config.init_from, config.sigma_d = teacher, 0.4
  with pytest.raises(UserError, match=r"config\.init_from=.*: trained on other data"):
    train.run(config, str(tmp_path))
  config.sigma_d, config.model.width = 0.5, 16
  message = r"config\.init_from: another network: .*; use the same config\.model"
  with pytest.raises(UserError, match=message):
    train.run(config, str(tmp_path))


def test_the_shapes_of_a_batch_are_those_of_the_loader(tmp_path):
  config = small("diffusion")
  dataset = build.build(config).dataset
  batch = next(train._batches(config, dataset, build.mesh(config), 0))
  shapes = training.batch_shapes(dataset, config.train.batch_size)
  assert jax.tree.structure(batch) == jax.tree.structure(shapes)
  for array, shape in zip(jax.tree.leaves(batch), jax.tree.leaves(shapes), strict=True):
    assert (array.shape, array.dtype) == (shape.shape, shape.dtype)


def test_a_variant_of_a_network_is_registered_with_it():
  config = config_lib.base()
  config.model = config_lib.component("models", "dit", depth=3, remat="full")
  names = ("unrolled", "without_kernels", "without_remat")
  model = build.model_variant(config, *names).model
  assert (model.unroll, model.attention, model.remat) == (3, "plain", "")
  assert (config.model.unroll, config.model.remat) == (1, "full")  # unchanged
  config.model = config_lib.component("models", "unet1d")
  assert build.model_variant(config, *names).model == config.model


def test_float16_is_refused_on_a_tpu():
  config = small("diffusion")
  checks.check_dtype(config, "tpu")
  config.model = config_lib.component("models", "edm2", dtype="float16")
  checks.check_dtype(config, "gpu")
  with pytest.raises(UserError, match="dtype=float16: TPUs have no float16 units; use"):
    checks.check_dtype(config, "tpu")


def test_a_writer_whose_package_is_missing_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  config = small("diffusion")
  checks.check_writer(config)
  config.writer.wandb = "p"
  with pytest.raises(UserError, match="config.writer.wandb=p: needs the package wandb"):
    checks.check_writer(config)
