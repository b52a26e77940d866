"""What a policy sees of Push-T, and the frame that its actions are told in.

In the frame of the block a push looks the same wherever the block lies: the origin is
the middle of the T, the axes turn with it. The task is its own mirror image about the
diagonal that the goal's stem lies on.
"""

import jax.numpy as jnp
import numpy as np

from sdiff_jax.policies.policy import View
from sdiff_jax.policies.pusht import env
from sdiff_jax.types import Array

FAR, STEP = 100.0, 10.0  # pixels: of positions, and of motions
FINE = ((30.0, 0.3), (8.0, 0.08))  # pixels, radians: of what is near its goal


def _turn(vector: Array, angle: Array) -> Array:
  """Returns vectors [..., 2] turned by angles [...]."""
  c, s = jnp.cos(angle), jnp.sin(angle)
  x, y = vector[..., 0], vector[..., 1]
  return jnp.stack([c * x - s * y, s * x + c * y], -1)


def _points(points: np.ndarray, pose: Array) -> Array:
  """Returns where points [n, 2] of the block are at poses [..., 3], [..., n, 2]."""
  points = points.astype(pose.dtype).reshape((1,) * (pose.ndim - 1) + points.shape)
  return pose[..., None, :2] + _turn(points, pose[..., None, 2])


def block(state: Array, before: Array) -> Array:
  """Returns an observation in the block's frame, [..., 14].

  The agent's position and last motion, what the block misses of its goal, and the
  latter again in finer units, bounded by tanh.

  Args:
    state: [..., 5].
    before: the state one step ago, [..., 5].
  """
  middle, pose = np.array([[0.0, env.CENTRE]]), state[..., 2:]
  goal = jnp.broadcast_to(jnp.array(env.GOAL, pose.dtype), pose.shape)
  here, there = (_points(middle, p)[..., 0, :] for p in (pose, goal))
  offset, agent, motion = (
    _turn(vector, -pose[..., 2])
    for vector in (
      there - here,
      state[..., :2] - here,
      state[..., :2] - before[..., :2],
    )
  )
  angle = jnp.remainder(goal[..., 2] - pose[..., 2] + jnp.pi, 2 * jnp.pi) - jnp.pi
  fine = [
    jnp.tanh(part)
    for pixels, radians in FINE
    for part in (offset / pixels, angle[..., None] / radians)
  ]
  turned = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1)
  return jnp.concatenate([agent / FAR, motion / STEP, offset / FAR, turned, *fine], -1)


def frame(state: Array) -> Array:
  """Returns R and o for states [..., 5]: of R (a - o), as the agent sees a target a.

  R turns into the block's frame, o is the agent's position; [..., 2, 3].
  """
  c, s, o = jnp.cos(state[..., 4]), jnp.sin(state[..., 4]), state[..., :2]
  rows = [c, s, o[..., 0], -s, c, o[..., 1]]
  return jnp.stack(rows, -1).reshape(*state.shape[:-1], 2, 3)


def keypoints(state: Array, before: Array) -> Array:
  """Returns Diffusion Policy's observation: nine points of the T, the agent, [..., 20].

  The ninth point is the middle of the bar's inner side. `before` is not used.
  """
  del before
  seen = _points(np.array([*env.CORNERS, (0, 30)]), state[..., 2:])
  return jnp.concatenate([seen.reshape(*state.shape[:-1], -1), state[..., :2]], -1)


def mirror(state: Array, action: Array) -> tuple[Array, Array]:
  """Returns the mirror image of states [..., 5] and actions [..., 2].

  The mirror is the diagonal (x, y) -> (512 - y, 512 - x), which leaves the goal.
  """

  def flip(point: Array) -> Array:
    return env.SIDE - point[..., ::-1]

  angle = 2 * env.GOAL[2] - state[..., 4:]
  image = [flip(state[..., :2]), flip(state[..., 2:4]), angle]
  return jnp.concatenate(image, -1), flip(action)


STATE_SIZE = 5  # position of the agent, position and angle of the block
REST = np.full(STATE_SIZE, 200.0, np.float32)
VIEWS = {
  "block": View(STATE_SIZE, block, frame, REST),
  "keypoints": View(STATE_SIZE, keypoints, None, REST),
}


def lookup(frame: str) -> View:
  """Returns what a policy observes in a frame, one of VIEWS.

  Raises:
    ValueError: there is no such frame.

  Example:
    >>> lookup("keypoints").frame is None
    True
  """
  if frame not in VIEWS:
    raise ValueError(f"frame={frame!r}: use one of {', '.join(VIEWS)}")
  return VIEWS[frame]
