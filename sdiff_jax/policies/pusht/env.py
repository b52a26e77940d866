"""Push-T: a disc pushes a T-shaped block onto its outline (gym-pusht).

A state is [agent x, agent y, block x, block y, block angle] in pixels of a square of
512 and radians, an action the point [x, y] that the agent heads for. The reward is
min(1, coverage / 0.95), coverage being the fraction of the outline under the block.
"""

import os
from typing import Any

import numpy as np

from sdiff_jax.types import UserError

Env = Any  # of gym_pusht, which is an optional dependency

SIDE = 512.0
RADIUS = 15.0  # of the agent
GOAL = (256.0, 256.0, np.pi / 4)  # x, y, angle of the outline
STEPS = 300  # of an episode
RATE = 10  # steps a second
PICTURE = 160  # pixels
# Corners of the T around its origin, in turn; the stem points to +y.
CORNERS = np.array(
  [(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)],
  np.float64,
)
CENTRE = 45.0  # y of the centre of gravity
SUBSTEPS, DT = 10, 0.01  # of physics in a step, seconds
STIFFNESS, DAMPING = 100, 20  # of the agent's pull to its target


def make() -> Env:
  """Returns the environment, a gymnasium.Env whose observation is the state.

  Raises:
    UserError: gym-pusht is not installed.
  """
  os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
  try:
    import gym_pusht  # noqa: F401
    import gymnasium
  except ImportError as error:
    message = "Push-T needs gym-pusht: pip install 'sdiff_jax[robotics]'"
    raise UserError(f"{message} ({error})") from error
  return gymnasium.make(
    "gym_pusht/PushT-v0",
    obs_type="state",
    visualization_width=PICTURE,
    visualization_height=PICTURE,
    disable_env_checker=True,
  )


def initial(seed: int) -> np.ndarray:
  """Returns an episode's first state, as Diffusion Policy draws it, float64 [5]."""
  random = np.random.RandomState(seed)
  x, y = random.randint(50, 450), random.randint(50, 450)
  block = random.randint(100, 400), random.randint(100, 400)
  return np.array([x, y, *block, random.randn() * 2 * np.pi - np.pi])


def near_goal(seed: int) -> np.ndarray:
  """Returns a first state with the block some 30 pixels and 20 degrees off its goal."""
  random = np.random.default_rng(seed)
  agent = random.uniform(50, 450, 2)
  x, y, angle = GOAL + random.normal(size=3) * (30, 30, 0.35)
  # The environment turns the block about its centre of gravity after placing it.
  x, y = x - CENTRE * np.sin(angle), y - CENTRE * (1 - np.cos(angle))
  return np.array([*agent, x, y, angle])


def reset(env: Env, state: np.ndarray) -> np.ndarray:
  """Starts an episode from a state, and returns what comes of it."""
  return env.reset(options={"reset_to_state": state})[0]


def move(env: Env, target: tuple[float, float]) -> None:
  """Does the physics of env.step(target), and no more, to the bit."""
  agent, space = env.unwrapped.agent, env.unwrapped.space
  for _ in range(SUBSTEPS):
    (x, y), (u, v) = agent.position, agent.velocity
    u += (STIFFNESS * (target[0] - x) + DAMPING * (0 - u)) * DT
    v += (STIFFNESS * (target[1] - y) + DAMPING * (0 - v)) * DT
    agent.velocity = u, v
    space.step(DT)


def corners(pose: np.ndarray) -> np.ndarray:
  """Returns the corners of the T at poses x, y, angle [..., 3], float64 [..., 8, 2]."""
  c, s = np.cos(pose[..., 2]), np.sin(pose[..., 2])
  turn = np.stack([c, s, -s, c], -1).reshape(*pose.shape[:-1], 2, 2)
  return CORNERS @ turn + pose[..., None, :2]
