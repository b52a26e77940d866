"""A policy in Push-T: the job that lets it act, and the function that it is."""

import json
import pathlib
import types

import numpy as np
import optax
import pytest
from closed_forms import random_params

from sdiff_jax import config as configs
from sdiff_jax import policies
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import policies as policy_lib
from sdiff_jax.experiment import sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import rollout
from sdiff_jax.policies.pusht import env as env_lib
from sdiff_jax.policies.pusht import observations
from sdiff_jax.policies.pusht import rollout as rollout_lib
from sdiff_jax.training import state
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.types import UserError

pytest.importorskip("gym_pusht")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
  """A work directory of a policy that was not trained."""
  return untrained(tmp_path_factory.mktemp("policy"))


def untrained(folder: pathlib.Path, **loss) -> str:
  """Returns a work directory of a policy that was not trained.

  Args:
    folder: of the work directory.
    **loss: name and fields of its loss; {} for that of diffusion.
  """
  random = np.random.default_rng(0)
  states = np.float32(random.uniform(100, 400, (60, 5)))
  np.savez(
    folder / "demos.npz",
    observation=np.asarray(observations.block(states, states)),
    frame=np.asarray(observations.frame(states)),
    action=np.float32(random.uniform(0, 512, (60, 2))),
    episode_ends=np.array([30, 60]),
  )
  c = configs.base()
  c.data = configs.component("data", "trajectories", path=str(folder / "demos.npz"))
  c.data.update(n_obs_steps=1, action_range="percentile")
  c.model = configs.component("models", "mlp", width=16, depth=1)
  if loss:
    c.loss = configs.component("losses", **loss)
  c.sampler.update(name="ddim", steps=2, window=5)
  c.rollout.update(
    samplers=("ddim/2", "paraddpm/5"), episodes=2, num_timed=2, num_videos=1
  )
  workdir = str(folder / "run")
  built = experiments.build(c)
  workdir_lib.save_or_check_config(c, workdir, built.dataset)
  params = random_params(built.network, dtype="float32")
  with Checkpoints(workdir, keep=1) as checkpoints:
    created = state.create(params, optax.identity(), tuple(c.ema.profiles))
    checkpoints.save(1, created)
  (folder / "demos.npz").unlink()  # a policy is used without them
  return workdir


@pytest.fixture
def short(monkeypatch):
  """Episodes of 20 steps."""
  make = env_lib.make

  def limited():
    env = make()
    env._max_episode_steps = 20
    return env

  monkeypatch.setattr(env_lib, "make", limited)


@pytest.mark.usefixtures("short")
@pytest.mark.slow
def test_job_measures_every_sampler_in_the_same_episodes(trained, capsys):
  config = workdir_lib.read(trained)
  assert rollout.run(config, trained).startswith("2 episodes by each of 2 samplers")
  folder = pathlib.Path(trained) / "rollout"
  sequential, parallel = json.loads((folder / "results.json").read_text())
  assert (sequential["passes"], sequential["evaluations"]) == (2, 2)
  assert 1 <= parallel["passes"] <= 5 <= parallel["evaluations"]
  for row in (sequential, parallel):
    assert row["model"] == "teacher"
    assert row["reward"] == np.mean(row["rewards"])
    assert 0 <= row["reward"] <= 1
    assert 0 < row["median"] <= row["p95"]
    name = row["sampler"].replace("/", "_")
    assert (folder / f"{name}.gif").stat().st_size > 0
  gained = np.subtract(parallel["rewards"], sequential["rewards"])
  assert parallel["difference"] == gained.mean()
  assert parallel["difference_error"] == pytest.approx(abs(gained[1] - gained[0]) / 2)
  assert "difference" not in sequential
  assert "paraddpm/5" in capsys.readouterr().out
  config.rollout.update(samplers=("ddim/2",), num_timed=1, num_videos=0)
  rollout.run(config, trained)
  (again,) = json.loads((folder / "results.json").read_text())
  assert again["rewards"] == sequential["rewards"]


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_samplers_that_are_done_are_not_run_again(trained, monkeypatch):
  config = workdir_lib.read(trained)
  config.rollout.update(num_videos=0, num_timed=1)
  path = pathlib.Path(trained) / "rollout" / "results.json"
  rollout.run(config, trained)
  whole = [row["rewards"] for row in json.loads(path.read_text())]
  run, started = rollout_lib.run, []

  def stopping(*args, **options):
    if len(started) == 1:
      raise KeyboardInterrupt
    started.append(0)
    return run(*args, **options)

  monkeypatch.setattr(rollout_lib, "run", stopping)
  with pytest.raises(KeyboardInterrupt):
    rollout.run(config, trained)
  started.clear()
  rollout.run(config, trained)
  assert [row["rewards"] for row in json.loads(path.read_text())] == whole
  assert not (path.parent / "partial.npz").exists()


def test_episode_ends_with_the_reward_of_its_best_step(short):
  rewards = {"left": iter([0.1, 0.7, 0.3])}

  def step(action):
    reward = next(rewards["left"])
    return np.zeros(5), reward, reward == 0.3, False, {}

  env = types.SimpleNamespace(reset=lambda options: (np.zeros(5), {}), step=step)
  given = []

  def act(history, seeds):
    given.append(history.copy())
    return np.zeros((1, 2, 2)), {"passes": np.ones(1)}

  made = rollout_lib.run(act, [env], np.zeros((1, 5)), states=3, seed=0)
  assert made.reward.tolist() == [0.7]
  assert made.solved.tolist() == [True]
  assert made.cost["passes"].tolist() == [1, 1]
  assert given[0].shape == (1, 3, 5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"step": RuntimeError("boom")}, "episode 0, step 0: RuntimeError: boom"),
    ({"state": np.full(5, np.nan)}, "episode 0, step 0: the environment's state is"),
    ({"action": np.nan}, r"episode 0, step 0: .*the policy's action is"),
  ],
)
def test_failures_are_one_line(change, message):
  def step(action):
    if "step" in change:
      raise change["step"]
    return change.get("state", np.zeros(5)), 0.0, True, False, {}

  env = types.SimpleNamespace(reset=lambda options: (np.zeros(5), {}), step=step)

  def act(history, seeds):
    return np.full((1, 1, 2), change.get("action", 0.0)), {"passes": np.ones(1)}

  with pytest.raises(UserError, match=message):
    rollout_lib.run(act, [env], np.zeros((1, 5)), states=2, seed=0)


@pytest.mark.slow
def test_actions_depend_on_their_own_states_and_seed_alone(trained):
  one, many = (
    policies.load(trained, sampler="paraddpm/5", batch_size=n) for n in (1, 3)
  )
  states = np.random.default_rng(1).uniform(100, 400, (3, 2, 5))
  seeds = np.array([4, 5, 6], np.int32)
  together, _ = many.many(states, seeds)
  assert together.shape == (3, 8, 2)
  for k in range(3):
    np.testing.assert_allclose(one(states[k], seed=k + 4), together[k], atol=0.05)
  assert np.abs(one(states[0], seed=4) - one(states[0], seed=5)).max() > 1


@pytest.mark.slow
def test_a_flow_map_is_a_policy_of_any_number_of_steps(tmp_path):
  workdir = untrained(tmp_path, name="flow_map", velocity="data")
  states = np.float32(np.random.default_rng(1).uniform(100, 400, (2, 5)))
  samplers = ("flow_map/1", "flow_map/3", "ddim/2")
  actions = [policies.load(workdir, sampler=name)(states, seed=0) for name in samplers]
  assert all(np.isfinite(a).all() for a in actions)
  assert all(np.abs(a - actions[0]).max() > 1e-3 for a in actions[1:])


def test_passes_are_bounded(trained):
  config = workdir_lib.read(trained)
  config.sampler.tolerance = 0.0
  states = np.random.default_rng(1).uniform(100, 400, (1, 2, 5))
  bounded = policies.load(
    trained, sampler="paraddpm/5", max_iterations=2, config=config
  )
  actions, stats = bounded.many(states, np.zeros(1, np.int32))
  assert bounded.max_iterations == int(stats.num_iterations[0]) == 2
  assert np.isfinite(actions).all()
  with pytest.raises(ValueError, match="max_iterations=1: 1 iterations are too few"):
    policies.load(trained, sampler="ddim/2", max_iterations=1)


@pytest.mark.slow
def test_time_is_bounded(trained, monkeypatch):
  monkeypatch.setattr(policies.Policy, "iteration_seconds", lambda self: 0.01)
  act = policies.load(trained, sampler="paraddpm/5", seconds=0.035)
  assert act.max_iterations == 3
  assert policies.load(trained, sampler="ddim/2", seconds=0.021).max_iterations == 2
  with pytest.raises(
    ValueError, match="seconds=0.015: 1 iterations are too few .* allow"
  ):
    policies.load(trained, sampler="ddim/2", seconds=0.015)
  with pytest.raises(ValueError, match="seconds=0.005: 0 iterations are too few"):
    policies.load(trained, sampler="paraddpm/5", seconds=0.005)


def test_policies_of_other_observations_are_refused(trained):
  config = workdir_lib.read(trained)
  experiment, params = workdir_lib.trained(config, trained)
  sampler = sampling.build_sampler(config, strict=False)
  config.data.frame = "keypoints"
  with pytest.raises(UserError, match="observes 20 numbers .* trained on 14"):
    policy_lib.build(config, experiment, params, sampler)
  config.data.frame = "block"
  config.rollout.n_action_steps = 17
  with pytest.raises(
    UserError, match="config.rollout.n_action_steps=17: must be 1 to 16"
  ):
    policy_lib.build(config, experiment, params, sampler)


def test_only_the_sampler_of_the_config_has_its_angles():
  config = configs.base()
  config.sampler.update(name="consistency", steps=2, timesteps=(1.5, 0.7))
  config.sampler.temperature = 0.5
  own, other = (
    sampling.build_sampler(config, name).tableau for name in ("consistency/2", "ddim/2")
  )
  np.testing.assert_allclose(own.time, [1.5, 0.7])
  assert own.init_std == 0.25 * np.sin(1.5)
  assert other.time[1] > 0.75
  assert other.init_std == pytest.approx(0.25, abs=1e-4)


def test_wrong_states_are_refused(trained):
  act = policies.load(trained)
  with pytest.raises(ValueError, match=r"states: have shape \(1, 3, 5\), must be"):
    act(np.zeros((3, 5)))
  with pytest.raises(ValueError, match="states: are not finite"):
    act(np.full((2, 5), np.nan))
