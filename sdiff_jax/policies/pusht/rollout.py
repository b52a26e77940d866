"""Episodes of Push-T with a policy, many at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sdiff_jax.policies.pusht import env as env_lib
from sdiff_jax.policies.pusht.env import Env
from sdiff_jax.samplers import MAX_SEED
from sdiff_jax.types import UserError

SEED_STRIDE = 1_000_003  # between the seeds of an episode at two steps
# (states up to now [B, K, 5], seed of each episode's noise int32 [B]) -> actions
# [B, Ta, 2] and their cost, arrays [B] by name.
Act = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, dict[str, np.ndarray]]]


class Episodes(NamedTuple):
  """What came of E episodes.

  Attributes:
    reward: largest of each, float64 [E].
    solved: which ended with the goal reached, bool [E].
    cost: of every chunk of actions of every episode, [chunks], by name.
    histories: what the policy was given for some chunks, [n, K, 5].
  """

  reward: np.ndarray
  solved: np.ndarray
  cost: dict[str, np.ndarray]
  histories: np.ndarray


def run(
  act: Act,
  envs: list[Env],
  starts: np.ndarray,
  *,
  states: int,
  seed: int,
  progress: Callable[[int], None] = lambda steps: None,
  watch: Callable[[int], None] = lambda episode: None,
) -> Episodes:
  """Runs an episode from each start, all of them in step, to their ends.

  Args:
    act: the policy.
    envs: an environment an episode.
    starts: first states, [E, 5].
    states: K, states that the policy is given; the first is repeated at the start.
    seed: of the policy's noise.
    progress: called with the steps done.
    watch: called with the episode before each of its steps.

  Raises:
    UserError: an environment raises, or a state or an action is not finite.
  """
  E = len(starts)
  first = [_do(k, 0, env_lib.reset, env, starts[k]) for k, env in enumerate(envs)]
  history = np.repeat(np.array(first)[:, None], states, axis=1)
  reward, solved, going = np.zeros(E), np.zeros(E, bool), np.ones(E, bool)
  seeds, step, costs, seen = np.arange(E, dtype=np.int32) + seed * E, 0, [], []
  while going.any():
    actions, cost = act(history, seeds + np.int32(SEED_STRIDE * step))
    costs.append({name: values[going] for name, values in cost.items()})
    seen.append(history[going][:1])
    for action in np.moveaxis(np.float64(actions), 1, 0):
      for k in np.flatnonzero(going):
        watch(k)
        state, gained, done, late, _ = _do(k, step, _step, envs[k], action[k])
        history[k] = np.concatenate([history[k, 1:], state[None]])
        reward[k], solved[k] = max(reward[k], gained), solved[k] or done
        going[k] = not (done or late)
      step += 1
      progress(step)
  joined = {name: np.concatenate([c[name] for c in costs]) for name in costs[0]}
  return Episodes(reward, solved, joined, np.concatenate(seen))


def max_noise_seed(episodes: int) -> int:
  """Returns the largest seed of the noise of some episodes, whose own seeds are int32.

  Args:
    episodes: their number.
  """
  return (MAX_SEED - SEED_STRIDE * env_lib.STEPS) // episodes - 1


def _step(env: Env, action: np.ndarray) -> tuple:
  if not np.isfinite(action).all():
    raise UserError(f"the policy's action is {action}")
  return env.step(action)


def _do(episode: int, step: int, function: Callable, *args: Any) -> Any:
  """Returns function(*args), the first of whose results is a finite state."""
  where = f"episode {episode}, step {step}"
  try:
    made = function(*args)
  except Exception as error:
    raise UserError(f"{where}: {type(error).__name__}: {error}") from error
  state = made[0] if isinstance(made, tuple) else made
  if not np.isfinite(state).all():
    raise UserError(f"{where}: the environment's state is {state}: not finite")
  return made
