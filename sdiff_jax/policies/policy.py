"""A trained policy as a function: states in, actions out.

  policy = load("runs/pusht_scd", sampler="consistency/2")
  actions = policy(states)  # [Ta, Da], to be done one after the other

What it does is compiled once, for one robot or for many at a time.
"""

import functools
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sdiff_jax.data import trajectories
from sdiff_jax.experiment import sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.policies.pusht import observations
from sdiff_jax.samplers import sampler as sampler_lib
from sdiff_jax.samplers import sequential
from sdiff_jax.samplers._sliding_window import Samples
from sdiff_jax.samplers.sampler import Sampler
from sdiff_jax.types import Array, Params, UserError

TIMED = 20  # calls, of which the slowest bounds the time of a pass


class Policy:
  """A compiled policy.

  Attributes:
    states: K, how many states up to now it is given.
    max_passes: calls of the network, one after the other, that it never exceeds.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    experiment: Experiment,
    params: Params,
    plan: Sampler,
    *,
    batch_size: int = 1,
    max_passes: int = 0,
    seconds: float = 0.0,
  ):
    """Compiles the policy.

    Args:
      config: guidance, number of actions and what the policy sees (config.demos.view).
      experiment: with its normalizer.
      params: of the network.
      plan: the sampler, with its window chosen.
      batch_size: robots at a time.
      max_passes: most calls of the network, one after the other; 0 for any.
      seconds: most time of a call of the policy; 0 for any. Passes are timed, and no
        more of them made than fit.

    Raises:
      UserError: it was trained on other observations, its chunks have fewer actions
        than config.rollout.n_action_steps, or a sampler that cannot stop early takes more.
    """
    fitted, count = (
      experiment.dataset.normaliser,
      config.rollout.n_action_steps,
    )
    most = fitted.shape[0] - fitted.steps + 1
    if not 1 <= count <= most:
      raise UserError(f"config.rollout.n_action_steps={count}: take 1 to {most}")
    _check_view(config, experiment)
    self.states = fitted.steps + 1
    self._params, self._batch = params, batch_size
    if max_passes:
      plan = _bounded(plan, max_passes, f"max_passes={max_passes}")
    self._compile(config, experiment, plan)
    if seconds:
      fit = int(seconds / self.pass_seconds())
      if fit < self.max_passes:
        self._compile(config, experiment, _bounded(plan, fit, f"seconds={seconds}"))

  def _compile(
    self, config: ml_collections.ConfigDict, experiment: Experiment, plan: Sampler
  ) -> None:
    self.max_passes = plan.max_passes or plan.table.evaluations
    act = functools.partial(_act, config, experiment, plan)
    states = jax.ShapeDtypeStruct((self._batch, self.states, 5), jnp.float32)
    seeds = jax.ShapeDtypeStruct((self._batch,), jnp.int32)
    self._call = jax.jit(act).lower(self._params, states, seeds).compile()

  def __call__(self, states: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns the actions to do next, float32 [Ta, Da].

    Args:
      states: up to now, the last of them now, [K, 5].
      seed: of the noise that they are made of.

    Raises:
      UserError: states of another shape, or that are not finite.
    """
    return self.many(np.asarray(states)[None], np.int32([seed]))[0][0]

  def many(self, states: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, Samples]:
    """Returns actions [B, Ta, Da] for many robots, and what they took (x is None).

    Args:
      states: of each, [B, K, 5].
      seeds: of each, int32 [B].

    Raises:
      UserError: states of another shape, or that are not finite.
    """
    shape = (self._batch, self.states, 5)
    if np.shape(states) != shape:
      raise UserError(f"states {np.shape(states)}: the policy takes {shape}")
    if not np.isfinite(states).all():
      raise UserError(f"states are not finite: {np.asarray(states).tolist()}")
    actions, result = self._call(self._params, np.float32(states), np.int32(seeds))
    return np.asarray(actions), result

  def pass_seconds(self) -> float:
    """Returns the most seconds that a pass took in a few calls."""
    states = np.full((self._batch, self.states, 5), 200.0, np.float32)
    worst = 0.0
    for seed in range(TIMED + 1):
      begin = time.perf_counter()
      _, result = self.many(states, np.full(self._batch, seed, np.int32))
      took = (time.perf_counter() - begin) / int(result.passes.max())
      worst = max(worst, took) if seed else worst  # the first one warms up
    return worst


def _check_view(config: ml_collections.ConfigDict, experiment: Experiment) -> None:
  """Raises a UserError if the network was trained on what another view shows."""
  view = config.demos.view
  state = jax.ShapeDtypeStruct((5,), jnp.float32)
  shown = jax.eval_shape(observations.FRAMES[view][0], state, state).size
  wanted = len(experiment.dataset.normaliser.observation.centre)
  if shown != wanted:
    raise UserError(
      f"config.demos.view={view!r}: shows {shown} numbers of Push-T; the policy was "
      f"trained on {wanted}"
    )


def _bounded(plan: Sampler, most: int, what: str) -> Sampler:
  """Returns the plan with no more passes than that, if it can do with so few."""
  rows = plan.table.evaluations
  if most < rows and (most < 1 or plan.loop not in ("para", "spec")):
    raise UserError(
      f"{what}: {max(most, 0)} passes are too few for a sampler of {rows} that cannot "
      "stop early; allow more, or take a parallel sampler or a distilled policy"
    )
  return plan._replace(max_passes=min(most, rows))


def _act(
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  plan: Sampler,
  params: Params,
  states: Array,
  seeds: Array,
) -> tuple[Array, Samples]:
  """Returns actions and what they took; see Policy.many."""
  fitted, count = experiment.dataset.normaliser, config.rollout.n_action_steps
  observe, frame = observations.FRAMES[config.demos.view]
  observation = observe(states[:, 1:], states[:, :-1])
  keys = sequential.keys_from_seeds(seeds)
  result = sampler_lib.run(
    plan,
    sampling.denoiser(experiment, params, config.sample.guidance),
    sequential.sample_prior(plan.table, keys, fitted.shape),
    keys,
    {"observation": trajectories.observed(fitted, observation)},
  )
  actions = trajectories.actions(fitted, result.x, experiment.sigma_d)
  if frame:
    actions = trajectories.out_of_frame(frame(states[:, -1]), actions)
  first = fitted.steps - 1
  return actions[:, first : first + count], result._replace(x=None)


def load(
  workdir: str,
  *,
  sampler: str = "",
  batch_size: int = 1,
  max_passes: int = 0,
  seconds: float = 0.0,
  config: ml_collections.ConfigDict | None = None,
) -> Policy:
  """Returns the policy that a work directory was trained to.

  Args:
    workdir: of the run.
    sampler: "name/steps", such as "paraddpm/100"; "" for that of the config.
    batch_size: robots at a time.
    max_passes: see Policy.
    seconds: see Policy.
    config: how to sample; None for what the run was trained with.

  Raises:
    UserError: there is no such policy, or a field does not fit.
  """
  config = config or workdir_lib.read(workdir)
  experiment, params = workdir_lib.trained(config, workdir)
  if experiment.dataset.normaliser is None:
    raise UserError(f"{workdir} holds no policy: its data are images")
  chosen = sampling.plan(config, sampler or None)
  chosen = sampling.with_window(config, experiment, chosen, params, batch_size)
  bounds = {"max_passes": max_passes, "seconds": seconds}
  return Policy(config, experiment, params, chosen, batch_size=batch_size, **bounds)
