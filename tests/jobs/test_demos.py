"""The job that makes demonstrations: it resumes wherever it was stopped."""

import os

import numpy as np
import pytest

from sdiff_jax import config as configs
from sdiff_jax.data import trajectories
from sdiff_jax.jobs import demos
from sdiff_jax.policies.pusht import env as env_lib
from sdiff_jax.policies.pusht import expert
from sdiff_jax.types import UserError

pytest.importorskip("gym_pusht")


@pytest.fixture(scope="module")
def made() -> dict[int, expert.Episode]:
  envs = env_lib.make(), env_lib.make()
  return {k: expert.demonstrate(*envs, demos.start(k), k) for k in (0, 3, 6)}


@pytest.fixture
def config(tmp_path, monkeypatch, made):
  """A config whose episodes are at hand, and made in this process."""
  c = configs.base()
  c.data = configs.component("data", "trajectories", path=str(tmp_path / "demos.npz"))
  c.data.update(n_obs_steps=1, action_range="percentile")
  c.demos.update(episodes=3, seed=0)
  known = dict(zip(range(3), made.values(), strict=True))

  def demonstrate(env, model, start, seed):
    return known[seed]

  def make(folder, seeds, total):
    for seed in seeds:
      demos._episode(folder, seed)

  monkeypatch.setattr(expert, "demonstrate", demonstrate)
  monkeypatch.setattr(demos, "_make", make)
  return c


@pytest.mark.slow
def test_episodes_come_with_their_mirror_images(config, tmp_path):
  line = demos.run(config, str(tmp_path))
  assert line.startswith("kept 3 of 3 episodes")
  with np.load(config.data.path) as arrays:
    found = dict(arrays)
  N = found["episode_ends"][-1]
  assert len(found["episode_ends"]) == 6
  assert found["seeds"].tolist() == [0, 1, 2]
  swapped = 512 - found["action"][: N // 2, ::-1]
  np.testing.assert_allclose(found["action"][N // 2 :], swapped, atol=1e-4)
  # At the start of an episode nothing has moved.
  starts = [0, *found["episode_ends"][:-1]]
  assert (found["observation"][starts, 2:4] == 0).all()
  assert (found["observation"][:, 2:4] != 0).any()
  assert not os.path.exists(f"{config.data.path}.parts")
  source = trajectories.build(path=config.data.path, n_obs_steps=1)
  assert source.shape == (16, 2)
  assert source.cond["observation"].shape == (14,)
  assert "are there already" in demos.run(config, str(tmp_path))


def test_keypoints_have_no_frame(config, tmp_path):
  config.data.frame = "keypoints"
  demos.run(config, str(tmp_path))
  with np.load(config.data.path) as arrays:
    assert "frame" not in arrays
    assert arrays["observation"].shape[1] == 20


def test_goes_on_where_it_stopped_with_the_same_end(config, tmp_path, monkeypatch):
  demos.run(config, str(tmp_path))
  with np.load(config.data.path) as arrays:
    whole = dict(arrays)
  os.remove(config.data.path)
  done, asked = [], expert.demonstrate

  def stopping(env, model, start, seed):
    if len(done) == 2:
      raise KeyboardInterrupt
    done.append(seed)
    return asked(env, model, start, seed)

  monkeypatch.setattr(expert, "demonstrate", stopping)
  with pytest.raises(KeyboardInterrupt):
    demos.run(config, str(tmp_path))
  assert done == [0, 1]
  done.clear()
  demos.run(config, str(tmp_path))
  assert done == [2]
  with np.load(config.data.path) as arrays:
    for name, x in arrays.items():
      np.testing.assert_array_equal(x, whole[name])


def test_only_what_succeeded_is_kept(config, tmp_path, monkeypatch):
  asked = expert.demonstrate

  def failing(env, model, start, seed):
    return asked(env, model, start, seed)._replace(solved=seed == 1)

  monkeypatch.setattr(expert, "demonstrate", failing)
  assert demos.run(config, str(tmp_path)).startswith("kept 1 of 3 episodes")
  with np.load(config.data.path) as arrays:
    assert arrays["seeds"].tolist() == [1]
  os.remove(config.data.path)
  monkeypatch.setattr(
    expert, "demonstrate", lambda *a: asked(*a)._replace(solved=False)
  )
  with pytest.raises(
    UserError, match="no episode succeeded; increase config.demos.episodes"
  ):
    demos.run(config, str(tmp_path))


def test_wrong_fields_are_refused(config, tmp_path):
  config.data.frame = "pixels"
  with pytest.raises(UserError, match=r"config.data.frame='pixels': use one of"):
    demos.run(config, str(tmp_path))
  config.data.frame, config.data.path = "block", "demos"
  with pytest.raises(UserError, match="name the .npz file to write"):
    demos.run(config, str(tmp_path))
