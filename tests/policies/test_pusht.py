"""Push-T: its physics, its expert, and what a policy sees of it."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.data import trajectories
from sdiff_jax.policies.pusht import env as env_lib
from sdiff_jax.policies.pusht import expert, observations

pytest.importorskip("gym_pusht")


@pytest.fixture(scope="module")
def envs():
  return env_lib.make(), env_lib.make()


def states(count: int) -> np.ndarray:
  random = np.random.default_rng(0)
  return random.uniform([0] * 4 + [-9], [512] * 4 + [9], (count, 5))


def test_first_states_are_those_of_diffusion_policy(envs):
  # Its test seed 100000, by its own random numbers and its order of assignments.
  random = np.random.RandomState(100_000)
  x, y = random.randint(50, 450), random.randint(50, 450)
  block = random.randint(100, 400), random.randint(100, 400)
  assert env_lib.initial(100_000)[:4].tolist() == [x, y, *block]
  assert env_lib.reset(envs[0], env_lib.initial(100_000))[:2].tolist() == [x, y]


def test_moves_are_the_environments_to_the_bit(envs):
  env, model = envs
  random = np.random.default_rng(1)
  for env_or_model in envs:
    env_lib.reset(env_or_model, env_lib.initial(7))
  for _ in range(40):
    block = np.array(env.unwrapped.block.position)
    target = block + random.normal(0, 60, 2)  # through the block, most often
    state = env.step(target)[0]
    env_lib.move(model, tuple(target))
    assert model.unwrapped.get_obs().tolist() == state.tolist()


def test_corners_are_the_environments(envs):
  env, pose = envs[0], states(1)[0, 2:]
  env_lib.reset(env, np.array([20, 20, *pose]))
  body = env.unwrapped.block
  theirs = {
    tuple(np.round(body.local_to_world(v), 6))
    for shape in body.shapes
    for v in shape.get_vertices()
  }
  mine = env_lib.corners(np.array([*body.position, body.angle]))
  assert theirs <= {
    tuple(np.round(body.local_to_world(tuple(v)), 6)) for v in env_lib.CORNERS
  } | {tuple(np.round(body.local_to_world(v), 6)) for v in ((-15, 30), (15, 30))}
  np.testing.assert_allclose(
    mine, [body.local_to_world(tuple(v)) for v in env_lib.CORNERS], atol=1e-9
  )
  assert abs(body.center_of_gravity[1] - env_lib.CENTRE) < 1e-12


def test_starts_near_the_goal_are(envs):
  off = [
    env_lib.reset(envs[0], env_lib.near_goal(seed))[2:4] - env_lib.GOAL[:2]
    for seed in range(20)
  ]
  assert 10 < np.std(off) < 50


@pytest.mark.parametrize("start", [env_lib.initial(3), env_lib.near_goal(3)])
def test_expert_reaches_the_goal_again_in_a_replay(envs, start):
  made = expert.demonstrate(*envs, start, 3)
  assert made.solved
  assert ((made.action >= 0) & (made.action <= env_lib.SIDE)).all()
  state = env_lib.reset(envs[0], start)
  for before, action in zip(made.state, made.action, strict=True):
    assert state.tolist() == before.tolist()
    state, _, solved, _, _ = envs[0].step(action)
  assert solved


def test_distance_to_the_block():
  corner = env_lib.corners(np.array([0.0, 0, 0]))
  points = {
    (0, 15): 0,
    (0, 100): 0,
    (0, -7): 7,
    (25, 100): 10,
    (63, 34): 5,
    (15, 30): 0,
  }
  for point, distance in points.items():
    assert abs(expert.distance(np.array(point, float), corner) - distance) < 1e-12


def test_ways_keep_off_the_block():
  pose = np.array([256.0, 256, 0.3])
  corner = env_lib.corners(pose)
  for a, b in states(60)[:, :4].reshape(-1, 2, 2) * 0.8 + 50:
    if min(expert.distance(p, corner) for p in (a, b)) < 25:
      continue
    points = [a, *expert.way(a, b, pose)]
    assert points[-1].tolist() == b.tolist()
    for p, q in itertools.pairwise(points):
      between = p + np.linspace(0, 1, 50)[:, None] * (q - p)
      assert min(expert.distance(x, corner) for x in between) > env_lib.RADIUS - 4


def test_block_frame_does_not_depend_on_where_the_task_lies(x64):
  # The whole task, goal as well, turned and shifted: only the goal can tell.
  now = jnp.array(states(8))
  action = jnp.array(states(8)[:, :2])[:, None]
  frame = np.asarray(observations.frame(now))
  seen = trajectories.into_frame(frame, np.asarray(action))
  shifted = now.at[:, :4].add(13.0)
  again = trajectories.into_frame(
    np.asarray(observations.frame(shifted)), np.asarray(action) + 13
  )
  np.testing.assert_allclose(again, seen, atol=1e-9)
  back = trajectories.out_of_frame(frame, seen)
  np.testing.assert_allclose(back, action, atol=1e-9)


def test_mirror_image_is_seen_mirrored(x64):
  now, before = jnp.array(states(6)), jnp.array(states(6)) + 1.0
  action = jnp.array(states(6)[:, 2:4])
  (now_, action_), (before_, _) = (
    observations.mirror(s, action) for s in (now, before)
  )
  signs = np.array([-1, 1, -1, 1, -1, 1, -1, 1, *[-1, 1, -1] * 2])
  np.testing.assert_allclose(
    observations.block(now_, before_),
    np.asarray(observations.block(now, before)) * signs,
    atol=1e-9,
  )
  seen, image = (
    trajectories.into_frame(np.asarray(observations.frame(s)), np.asarray(a)[:, None])
    for s, a in ((now, action), (now_, action_))
  )
  np.testing.assert_allclose(image, seen * np.array([-1, 1]), atol=1e-9)
  twice = observations.mirror(now_, action_)
  np.testing.assert_allclose(twice[0], now, atol=1e-9)


def test_physics_has_the_mirror_image_too(envs):
  model, state = envs[0], np.array([100, 100, 250, 240, 0.4])
  env_lib.reset(model, state)
  pushes = expert.draw(state, np.random.default_rng(2))[:20]
  image = np.asarray(observations.mirror(state, state[:2])[0], np.float64)
  for push in pushes:
    start = np.asarray(observations.mirror(state, push.start)[1], np.float64)
    mirrored = push._replace(start=start, direction=-push.direction[::-1])
    pose, other = (
      expert.simulate(model, *x) for x in ((state, push), (image, mirrored))
    )
    expected = np.asarray(observations.mirror(np.array([0, 0, *pose]), pose[:2])[0])[2:]
    np.testing.assert_allclose(other, expected, atol=0.1)


def test_keypoints_end_with_the_agent():
  state = np.float32(states(2))
  seen = np.asarray(observations.keypoints(state, state))
  assert seen.shape == (2, 20)
  np.testing.assert_allclose(seen[:, 18:], state[:, :2])
  expected = env_lib.corners(state[:, 2:].astype(float))
  np.testing.assert_allclose(seen[:, :16].reshape(2, 8, 2), expected, atol=1e-3)
