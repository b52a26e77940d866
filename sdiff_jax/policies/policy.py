"""A diffusion policy as a function: states in, actions out.

It is compiled once, for one robot or for many at a time.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import samplers
from sdiff_jax.data import trajectories
from sdiff_jax.data.episodes.normalizer import Normalizer
from sdiff_jax.samplers import Sampler, SamplingStats
from sdiff_jax.types import Array, Denoiser, Params

NUM_TIMED = 20  # calls, of which the slowest bounds the time of an iteration


class View(NamedTuple):
  """What a policy observes of an environment's states.

  Attributes:
    state_size: numbers of a state, S.
    observe: (states [..., S], the states one step before [..., S]) -> observations
      [..., Do].
    frame: states [..., S] -> R and o [..., Da, Da + 1], where actions a are given as
      R (a - o); None if they are given as they are.
    rest: a state to time the policy with, [S].
  """

  state_size: int
  observe: Callable[[Array, Array], Array]
  frame: Callable[[Array], Array] | None
  rest: np.ndarray


class Policy:
  """A compiled policy.

  Attributes:
    num_states: K, the number of states up to now that the policy is given.
    max_iterations: sequential calls of the network that it never exceeds.
  """

  def __init__(
    self,
    denoiser: Callable[[Params], Denoiser],
    params: Params,
    sampler: Sampler,
    normalizer: Normalizer,
    view: View,
    *,
    sigma_d: float,
    n_action_steps: int,
    batch_size: int = 1,
    max_iterations: int = 0,
    seconds: float = 0.0,
  ):
    """Compiles the policy.

    Args:
      denoiser: params -> denoiser of chunks of actions, whose condition is
        "observation" [B, To Do].
      params: of the denoiser.
      sampler: with its window chosen.
      normalizer: of observations and actions.
      view: what the policy observes.
      sigma_d: standard deviation that normalized actions are scaled to.
      n_action_steps: Ta, actions of a chunk that are executed.
      batch_size: robots at a time, B.
      max_iterations: largest number of sequential calls of the network; 0 for any.
      seconds: largest time of a call of the policy; 0 for any. Iterations are timed,
        and no more of them made than fit.

    Raises:
      ValueError: the normalizer is of other observations, its chunks have fewer actions
        than n_action_steps, or a sampler that cannot stop early needs more iterations.
    """
    check_action_steps(n_action_steps, normalizer)
    check_view(view, normalizer)
    self.num_states = normalizer.steps + 1
    self._denoiser, self._params, self._sigma_d = denoiser, params, sigma_d
    self._normalizer, self._view = normalizer, view
    self._n_action_steps, self._batch_size = n_action_steps, batch_size
    if max_iterations:
      given = f"max_iterations={max_iterations}"
      sampler = _bounded(sampler, max_iterations, given)
    self._compile(sampler)
    if seconds:
      fit = int(seconds / self.iteration_seconds())
      if fit < self.max_iterations:
        self._compile(_bounded(sampler, fit, f"seconds={seconds}"))

  def _compile(self, sampler: Sampler) -> None:
    bound = sampler.options.get("max_iterations", 0)
    self.max_iterations = bound or sampler.num_steps

    def act(params: Params, states: Array, seeds: Array) -> tuple[Array, SamplingStats]:
      return self._act(sampler, params, states, seeds)

    states = jax.ShapeDtypeStruct(self._state_shape(), jnp.float32)
    seeds = jax.ShapeDtypeStruct((self._batch_size,), jnp.int32)
    self.compiled = jax.jit(act).lower(self._params, states, seeds).compile()

  def _state_shape(self) -> tuple[int, int, int]:
    return self._batch_size, self.num_states, self._view.state_size

  def _act(
    self, sampler: Sampler, params: Params, states: Array, seeds: Array
  ) -> tuple[Array, SamplingStats]:
    """Returns actions and their cost; see `many`."""
    normalizer, view = self._normalizer, self._view
    observation = view.observe(states[:, 1:], states[:, :-1])
    cond = {"observation": trajectories.observed(normalizer, observation)}
    out = samplers.sample(
      sampler, self._denoiser(params), seeds, normalizer.shape, cond
    )
    actions = trajectories.actions(normalizer, out.x, self._sigma_d)
    if view.frame:
      actions = trajectories.out_of_frame(view.frame(states[:, -1]), actions)
    first = normalizer.steps - 1
    return actions[:, first : first + self._n_action_steps], SamplingStats(*out[1:-1])

  def __call__(self, states: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns the next actions, float32 [Ta, Da].

    Args:
      states: up to now, the last of them now, [K, S].
      seed: of the noise that the actions are sampled from.

    Raises:
      ValueError: states of another shape, or that are not finite.
    """
    return self.many(np.asarray(states)[None], np.array([seed]))[0][0]

  def many(
    self, states: np.ndarray, seeds: np.ndarray
  ) -> tuple[np.ndarray, SamplingStats]:
    """Returns actions [B, Ta, Da] of many robots, and the cost of each.

    Args:
      states: of each robot, [B, K, S].
      seeds: of each robot, int32 [B].

    Raises:
      ValueError: states of another shape, seeds out of range, or states or actions that
        are not finite.
    """
    shape = self._state_shape()
    if np.shape(states) != shape:
      raise ValueError(f"states: have shape {np.shape(states)}, must be {shape}")
    if not np.isfinite(states).all():
      raise ValueError(f"states: are not finite: {np.asarray(states).tolist()}")
    samplers.check_seeds(seeds)
    actions, stats = self.unchecked(states, seeds)
    if not np.isfinite(actions).all():
      raise ValueError(
        "denoiser: the actions are not finite; check the network's weights, use a wider "
        "dtype, more steps, or less guidance"
      )
    return actions, stats

  def unchecked(
    self, states: np.ndarray, seeds: np.ndarray
  ) -> tuple[np.ndarray, SamplingStats]:
    """Returns what `many` does, without a check of the arguments and of the actions.

    Args:
      states: of each robot, [B, K, S].
      seeds: of each robot, int32 [B].
    """
    actions, stats = self.compiled(self._params, np.float32(states), np.int32(seeds))
    return np.asarray(actions), stats

  def iteration_seconds(self) -> float:
    """Returns the largest time of an iteration, in seconds, in a few calls."""
    states = np.broadcast_to(np.float32(self._view.rest), self._state_shape())
    slowest = 0.0
    for seed in range(NUM_TIMED + 1):
      begin = time.perf_counter()
      _, stats = self.many(states, np.full(self._batch_size, seed, np.int32))
      seconds = (time.perf_counter() - begin) / int(stats.num_iterations.max())
      slowest = max(slowest, seconds) if seed else slowest  # the first call warms up
    return slowest


def check_action_steps(n_action_steps: int, normalizer: Normalizer) -> None:
  """Raises a ValueError if a chunk has fewer actions from now on than are executed."""
  largest = normalizer.shape[0] - normalizer.steps + 1
  if not 1 <= n_action_steps <= largest:
    raise ValueError(f"n_action_steps={n_action_steps}: must be 1 to {largest}")


def check_view(view: View, normalizer: Normalizer) -> None:
  """Raises a ValueError if a normalizer is of other observations than the view's."""
  state = jax.ShapeDtypeStruct((view.state_size,), jnp.float32)
  observed = jax.eval_shape(view.observe, state, state).size
  trained_on = len(normalizer.observation.centre)
  if observed != trained_on:
    raise ValueError(
      f"view: observes {observed} numbers of a state; the policy was trained on "
      f"{trained_on}"
    )


def _bounded(sampler: Sampler, iterations: int, given: str) -> Sampler:
  """Returns the sampler with a bound on its iterations.

  Args:
    sampler: the sampler.
    iterations: the bound.
    given: the argument that it comes from, for the message.

  Raises:
    ValueError: the sampler needs more iterations.
  """
  steps = sampler.num_steps
  stops_early = sampler.takes("max_iterations")
  if iterations < steps and (iterations < 1 or not stops_early):
    raise ValueError(
      f"{given}: {max(iterations, 0)} iterations are too few for a sampler of {steps} "
      "that cannot stop early; allow more, or use a parallel sampler or a distilled "
      "policy"
    )
  if not stops_early:
    return sampler
  return sampler.replace(max_iterations=min(iterations, steps))
