"""An expert for Push-T that plans by sampling: draws pushes, simulates them, does the
best.

A push starts beside the block, follows a line for a few dozen pixels and draws back.
The way to its start leads around the block. The expert knows the physics; what it
shows is a demonstration, not a person's.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sdiff_jax.policies.pusht import env as env_lib
from sdiff_jax.policies.pusht.env import Env

CANDIDATES = 60  # pushes of which the best is done
CLEARANCE = 21.0  # pixels from the block's side to the agent's centre at the start
PUSH, TRAVEL = 12.0, 18.0  # pixels a step
RETREAT = 2  # steps back after a push
AROUND = 115.0  # radius of the way around the block, about the middle of the T
MIDDLE = np.array([0.0, 45.0])
NEAR = 4.0  # pixels from the start where the push begins


class Episode(NamedTuple):
  """What an expert did: states before each action, actions, whether it succeeded."""

  state: np.ndarray
  action: np.ndarray
  solved: bool


class Push(NamedTuple):
  """Where a push starts, its direction, a unit vector, and its length in pixels."""

  start: np.ndarray
  direction: np.ndarray
  length: float

  def targets(self) -> list[np.ndarray]:
    """Returns the targets of its steps, and of those back."""
    forth = np.append(np.arange(PUSH, self.length, PUSH), self.length)
    back = self.length - PUSH * np.arange(1, RETREAT + 1)
    return [self.start + d * self.direction for d in np.append(forth, back)]


def demonstrate(env: Env, model: Env, start: np.ndarray, seed: int) -> Episode:
  """Returns an episode of the expert.

  Args:
    env: the environment.
    model: another one, to try pushes in.
    start: the first state.
    seed: of the pushes that are drawn.
  """
  random = np.random.default_rng(seed)
  state, done = env_lib.reset(env, start), False
  env_lib.reset(model, start)
  states, actions = [], []
  while not done and len(actions) < env_lib.STEPS:
    for target in _steps(env, model, state, random):
      action = np.clip(target, 0, env_lib.SIDE)
      states.append(state)
      actions.append(action)
      state, _, solved, truncated, _ = env.step(action)
      done = solved or truncated
      if done:
        break
  return Episode(np.array(states), np.array(actions), bool(solved))


def _steps(
  env: Env, model: Env, state: np.ndarray, random: np.random.Generator
) -> Iterator[np.ndarray]:
  """Yields the targets of one push, with the way to its start."""
  push = best(model, state, draw(state, random))
  agent = np.array(env.unwrapped.agent.position)
  target = agent
  for corner in way(agent, push.start, state[2:]):
    while (left := math.dist(corner, target)) > 0:
      target = target + (corner - target) * min(1.0, TRAVEL / left)
      yield target
  while math.dist(env.unwrapped.agent.position, push.start) > NEAR:
    yield push.start
  yield from push.targets()


def draw(state: np.ndarray, random: np.random.Generator) -> list[Push]:
  """Returns candidate pushes at a state; the nearer the goal, the shorter."""
  corner = env_lib.corners(state[2:])
  side = np.roll(corner, -1, axis=0) - corner
  length = np.hypot(*side.T)
  off = _cost(state[2:])
  scale = np.clip(0.8 * off, 4, 60)
  out = []
  while len(out) < CANDIDATES:
    k = random.choice(len(side), p=length / length.sum())
    inward = np.array([-side[k, 1], side[k, 0]]) / length[k]
    angle = random.uniform(-0.4, 0.4)
    c, s = math.cos(angle), math.sin(angle)
    direction = np.array([c * inward[0] - s * inward[1], s * inward[0] + c * inward[1]])
    start = corner[k] + random.uniform(0.05, 0.95) * side[k] - CLEARANCE * inward
    push = Push(start, direction, 9 + random.exponential(scale))
    inside = ((start > 24) & (start < env_lib.SIDE - 24)).all()
    if inside and distance(start, corner) > CLEARANCE - 4:
      out.append(push)
  return out


def best(model: Env, state: np.ndarray, pushes: list[Push]) -> Push:
  """Returns the push after which the block is nearest its goal."""
  costs = []
  for push in pushes:
    pose = simulate(model, state, push)
    travel = math.dist(push.start, state[:2])
    costs.append(_cost(pose) + 0.01 * travel)
  return pushes[int(np.argmin(costs))]


def simulate(model: Env, state: np.ndarray, push: Push) -> np.ndarray:
  """Returns the block's pose after a push, float64 [3]."""
  agent, block = model.unwrapped.agent, model.unwrapped.block
  agent.position, agent.velocity = tuple(push.start), (0, 0)
  block.angle = state[4]
  block.position = tuple(state[2:4])
  block.velocity, block.angular_velocity = (0, 0), 0
  for target in push.targets():
    env_lib.move(model, tuple(target))
  return np.array([*block.position, block.angle])


def _cost(pose: np.ndarray) -> float:
  """Returns the root mean square distance of the corners to their goals, pixels."""
  off = env_lib.corners(pose) - env_lib.corners(np.array(env_lib.GOAL))
  return float(np.sqrt(np.mean(np.sum(off**2, axis=-1))))


def distance(point: np.ndarray, corner: np.ndarray) -> float:
  """Returns the distance of a point to the block, 0 inside it.

  Args:
    point: [2].
    corner: corners of the block in turn, [8, 2].
  """
  side = np.roll(corner, -1, axis=0) - corner
  to = point - corner
  along = np.clip((to * side).sum(1) / (side * side).sum(1), 0, 1)
  nearest = np.hypot(*(to - along[:, None] * side).T).min()
  # Even-odd rule: sides that a ray to +x crosses.
  up = (corner[:, 1] > point[1]) != (np.roll(corner[:, 1], -1) > point[1])
  slope = side[:, 0] / np.where(side[:, 1] == 0, 1, side[:, 1])
  crossed = up & (point[0] < corner[:, 0] + (point[1] - corner[:, 1]) * slope)
  return 0.0 if crossed.sum() % 2 else float(nearest)


def way(a: np.ndarray, b: np.ndarray, pose: np.ndarray) -> list[np.ndarray]:
  """Returns the corners of a way from a to b that keeps off the block, b the last."""
  corner = env_lib.corners(pose)
  if _free(a, b, corner):
    return [b]
  c, s = math.cos(pose[2]), math.sin(pose[2])
  middle = pose[:2] + np.array([[c, -s], [s, c]]) @ MIDDLE
  begin, end = (math.atan2(*(p - middle)[::-1]) for p in (a, b))
  turn = (end - begin + math.pi) % (2 * math.pi) - math.pi
  ways = []
  for sweep in (turn, turn - math.copysign(2 * math.pi, turn)):
    at = begin + np.linspace(0, sweep, 2 + int(abs(sweep) / 0.3))
    ring = middle + AROUND * np.stack([np.cos(at), np.sin(at)], 1)
    points = [a, *np.clip(ring, 20, env_lib.SIDE - 20), b]
    pruned = _prune(points, corner)
    lines = [*itertools.pairwise(pruned)]
    long = sum(math.dist(*line) for line in lines)
    blocked = sum(not _free(*line, corner) for line in lines)
    ways.append((blocked, long, pruned[1:]))
  return min(ways, key=lambda w: w[:2])[2]


def _prune(points: list[np.ndarray], corner: np.ndarray) -> list[np.ndarray]:
  """Leaves out points of a way where the line past them is free."""
  kept, k = [points[0]], 0
  while k < len(points) - 1:
    ahead = range(len(points) - 1, k + 1, -1)
    k = next((j for j in ahead if _free(points[k], points[j], corner)), k + 1)
    kept.append(points[k])
  return kept


def _free(a: np.ndarray, b: np.ndarray, corner: np.ndarray) -> bool:
  """Returns whether the agent gets from a to b without touching the block."""
  count = 2 + int(math.dist(a, b) / 6)
  for share in np.linspace(0, 1, count):
    # Both ends are beside the block already.
    near = min(share, 1 - share) * math.dist(a, b)
    if distance(a + share * (b - a), corner) < min(CLEARANCE - 3, 12 + near):
      return False
  return True
