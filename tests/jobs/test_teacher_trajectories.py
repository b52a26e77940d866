"""Stored trajectories of a teacher: how they are made, read and trained on."""

import json
import pathlib
import shutil

import jax
import numpy as np
import optax
import pytest

from sdiff_jax import config as configs
from sdiff_jax.data import digits, teacher_trajectories
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import sampling, training
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import train, trajectories
from sdiff_jax.losses import cmt
from sdiff_jax.samplers import paradigms
from sdiff_jax.training import state, summary
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.types import UserError

NUM = 13


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A work directory to copy: a network that was not trained, but has random weights."""
  config = configs.base()
  config.model = configs.component("models", "mlp", width=16, depth=1)
  config.sampler.update(name="ddim", steps=6)
  config.trajectories.update(num=NUM, batch_size=8)
  workdir = tmp_path_factory.mktemp("trajectories") / "run"
  workdir_lib.save_or_check_config(config, str(workdir), digits.build())
  network = experiments.build(config).network
  leaves, treedef = jax.tree.flatten(network.init(jax.random.key(0)))
  keys = jax.random.split(jax.random.key(0), len(leaves))
  pairs = zip(leaves, keys, strict=True)
  noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in pairs]
  created = state.create(
    jax.tree.unflatten(treedef, noisy), optax.identity(), tuple(config.ema.profiles)
  )
  with Checkpoints(str(workdir)) as checkpoints:
    checkpoints.save(3, created)
  return workdir


@pytest.fixture
def copy(trained, tmp_path):
  return lambda name: shutil.copytree(trained, tmp_path / name)


def run(workdir: pathlib.Path, **fields) -> str:
  config = workdir_lib.read(str(workdir))
  for name, value in fields.items():
    section, _, field = name.rpartition("__")
    config[section or "trajectories"][field] = value
  return trajectories.run(config, str(workdir))


def files(workdir: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
  found = {}
  for path in sorted(workdir.glob("trajectories/states-*.npz")):
    with np.load(path) as arrays:
      found[path.name] = dict(arrays)
  return found


def about(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / "trajectories/trajectories.json").read_text())


def exact(x, time, cond):
  """A denoiser that XLA rounds alike in every batch, unlike products of matrices."""
  return x / (1 + abs(x) + time.reshape(-1, 1, 1, 1))


def test_parallel_trajectories_are_the_sequential_ones_to_the_bit(copy, monkeypatch):
  monkeypatch.setattr(paradigms, "ULPS", 0)
  monkeypatch.setattr(sampling, "denoiser", lambda *_: exact)
  alone, parallel = copy("alone"), copy("parallel")
  line = run(alone)
  assert line.startswith(f"made {NUM} trajectories of 7 states (")
  assert "6 evaluations each in 6 iterations" in line
  run(parallel, sampler__name="paraddim", sampler__window=4, sampler__tolerance=0.0)
  expected, found = files(alone), files(parallel)
  assert [len(part["indices"]) for part in expected.values()] == [8, 5]
  for name, part in expected.items():
    for key in ("indices", "seeds", "states", "cond_label"):
      np.testing.assert_array_equal(found[name][key], part[key])
    assert part["states"].shape[1:] == (7, 8, 8, 1)
    assert part["states"].std() > 0.1
  assert about(alone)["evaluations"] == 6 * NUM
  assert about(parallel)["evaluations"] > 6 * NUM
  assert about(alone)["flops"] > 0
  ratio = about(parallel)["flops"] / about(alone)["flops"]
  np.testing.assert_allclose(ratio, about(parallel)["evaluations"] / (6 * NUM))


@pytest.mark.slow
def test_trajectories_of_a_network_are_alike_to_rounding_over_a_mesh(copy):
  alone, parallel = copy("alone"), copy("parallel")
  run(alone)
  fields = {
    "sampler__name": "paraddim",
    "sampler__window": 4,
    "sampler__tolerance": 0.0,
  }
  run(parallel, **fields, mesh__data=2, mesh__window=4)
  for name, part in files(alone).items():
    found = files(parallel)[name]
    np.testing.assert_array_equal(found["cond_label"], part["cond_label"])
    np.testing.assert_allclose(found["states"], part["states"], atol=2e-5)


@pytest.mark.slow
def test_what_is_missing_is_made_again_alike_and_nothing_else(copy):
  workdir = copy("run")
  run(workdir)
  whole = files(workdir)
  folder = workdir / "trajectories"
  first, second = sorted(whole)
  stamp = (folder / first).stat().st_mtime_ns
  (folder / second).write_bytes((folder / second).read_bytes()[:1000])
  run(workdir)
  assert (folder / first).stat().st_mtime_ns == stamp
  jax.tree.map(np.testing.assert_array_equal, files(workdir), whole)
  run(workdir, num=16)  # the last file has all of its batch now
  assert [len(part["indices"]) for part in files(workdir).values()] == [8, 8]
  with pytest.raises(
    UserError, match=r"holds parts of other trajectories: sampler\.st"
  ):
    run(workdir, sampler__steps=5)


def test_pairs_of_states_with_their_times_and_conditions(copy):
  workdir = copy("run")
  run(workdir, sampler__name="heun", sampler__steps=3)
  folder, cond = str(workdir / "trajectories"), digits.build().cond
  states = np.concatenate([part["states"] for part in files(workdir).values()])
  labels = np.concatenate([part["cond_label"] for part in files(workdir).values()])
  grid = np.float32(about(workdir)["grid"])
  assert states.shape[1] == len(grid) == 4
  to_data = teacher_trajectories.read(folder, cond, to_data=True)
  assert (to_data.size, to_data.shape) == (3 * NUM, (2, 8, 8, 1))
  raw, values = to_data[np.arange(to_data.size)]
  np.testing.assert_array_equal(raw[:, 0], states[:, :3].reshape(-1, 8, 8, 1))
  np.testing.assert_array_equal(raw[:, 1], np.repeat(states[:, 3], 3, axis=0))
  np.testing.assert_array_equal(values["label"], np.repeat(labels, 3))
  np.testing.assert_array_equal(values[cmt.TIMES][:3, 0], grid[:3])
  assert not values[cmt.TIMES][:, 1].any()
  every = teacher_trajectories.read(folder, cond, to_data=False)
  times = every[np.arange(every.size)][1][cmt.TIMES]
  assert every.size == 6 * NUM
  assert (times[:, 0] > times[:, 1]).all()
  assert every.digest() != to_data.digest()


def student(teacher: pathlib.Path, **loss):
  config = workdir_lib.read(str(teacher))
  config.teacher.workdir = config.init_from = str(teacher)
  config.teacher.trajectories = str(teacher / "trajectories")
  config.loss = configs.component("losses", "cmt", **loss)
  config.train.update(steps=2, batch_size=8, log_every=1)
  return config


@pytest.mark.slow
def test_a_student_is_trained_on_them_and_pays_for_them(copy, tmp_path):
  teacher = copy("teacher")
  run(teacher)
  config = student(teacher)
  train.run(config, str(tmp_path / "student"))
  cost = summary.read(str(tmp_path / "student"))
  made = about(teacher)["flops"]
  assert made < cost["flops"] < 3 * made
  # No step evaluates the teacher, which steps on data do.
  experiment = experiments.build(config)
  per_step = training.run_flops(config, experiment)
  np.testing.assert_allclose(cost["flops"], made + 2 * per_step)
  config.teacher.trajectories = ""
  config.loss.update(solver="ddim", steps=4)
  drawn = training.run_flops(config, experiment)
  np.testing.assert_allclose(drawn - per_step, 8 * made / (6 * NUM), rtol=0.2)


def test_trajectories_that_do_not_fit_are_refused(copy, tmp_path):
  teacher = copy("teacher")
  with pytest.raises(UserError, match=r"trajectories\.json does not exist; make the"):
    train.run(student(teacher), str(tmp_path / "student"))
  with pytest.raises(UserError, match=r"sampler\.name='srdsddim': keeps no states"):
    run(teacher, sampler__name="srdsddim")
  run(teacher, sampler__name="specddpm", sampler__window=3)
  with pytest.raises(UserError, match="their solver adds noise"):
    train.run(student(teacher), str(tmp_path / "student"))
  config = student(teacher)
  config.loss = configs.component("losses", "scm")
  with pytest.raises(UserError, match=r"config\.loss\.name='scm' is trained on data"):
    train.run(config, str(tmp_path / "student"))
  path = teacher / "trajectories" / "trajectories.json"
  path.write_text(path.read_text().replace('"noise": true', '"noise": false'))
  config = student(teacher)
  config.data.mean = (-0.5,)
  with pytest.raises(UserError, match="made from other data"):
    train.run(config, str(tmp_path / "student"))
  next((teacher / "trajectories").glob("states-*")).unlink()
  with pytest.raises(UserError, match=f"of {NUM} trajectories; the same command"):
    train.run(student(teacher), str(tmp_path / "student"))
