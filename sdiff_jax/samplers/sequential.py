"""Runs the steps of a solver sequentially, and draws the noise of all samplers."""

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import registry
from sdiff_jax.samplers import tableau as tableau_lib
from sdiff_jax.samplers._samples import Samples
from sdiff_jax.samplers.tableau import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, PRNGKey, PyTree


def keys_from_seeds(seeds: np.ndarray | Array) -> PRNGKey:
  """Returns one random key for each integer seed.

  Args:
    seeds: integers, [B].

  Returns:
    Keys, [B].

  Example:
    >>> keys_from_seeds(np.arange(3)).shape
    (3,)
  """
  return jax.vmap(jax.random.key)(seeds)


def noise(keys: PRNGKey, i: Array | int, shape: tuple[int, ...]) -> Array:
  """Returns the noise after the evaluation of solver step i.

  Args:
    keys: one key a sample, [B]; the noise of sample k depends on keys[k] alone.
    i: the step; -1 is the noise of the initial state.
    shape: of one sample.

  Returns:
    Standard normal noise, float32 [B, *shape].

  Example:
    >>> noise(keys_from_seeds(np.arange(3)), 0, (2, 2)).shape
    (3, 2, 2)
  """

  def draw(key: PRNGKey) -> Array:
    return jax.random.normal(jax.random.fold_in(key, i + 1), shape, jnp.float32)

  return jax.lax.optimization_barrier(jax.vmap(draw)(keys))


def noise_before(keys: PRNGKey, i: Array | int, shape: tuple[int, ...]) -> Array:
  """Returns the noise before the evaluation of solver step i, independent of `noise`.

  Args:
    keys: one key a sample, [B].
    i: the step.
    shape: of one sample.

  Returns:
    Standard normal noise, float32 [B, *shape].

  Example:
    >>> noise_before(keys_from_seeds(np.arange(3)), 0, (2, 2)).shape
    (3, 2, 2)
  """

  def draw(key: PRNGKey) -> Array:
    # `speculative` draws its uniform numbers from fold 1 of a step's key.
    key = jax.random.fold_in(jax.random.fold_in(key, i + 1), 2)
    return jax.random.normal(key, shape, jnp.float32)

  return jax.lax.optimization_barrier(jax.vmap(draw)(keys))


def sample_prior(
  tableau: SolverTableau, keys: PRNGKey, shape: tuple[int, ...]
) -> Array:
  """Returns the initial states, N(0, init_std^2).

  Args:
    tableau: the solver.
    keys: one key a sample, [B].
    shape: of one sample.

  Returns:
    States, float32 [B, *shape].

  Example:
    >>> from sdiff_jax.samplers import solvers
    >>> tableau = solvers.build(sigma_d=0.5, name="ddim", steps=4)
    >>> sample_prior(tableau, keys_from_seeds(np.arange(3)), (2, 2)).shape
    (3, 2, 2)
  """
  return tableau.init_std * noise(keys, -1, shape)


def sample_noised(tableau: SolverTableau, keys: PRNGKey, x0: Array) -> Array:
  """Returns the initial states alpha x0 + sigma z of given data.

  The noise sigma z is that of `sample_prior`, which returns the states of x0 = 0.

  Args:
    tableau: the solver; alpha and sigma are those at the start of its first step.
    keys: one key a sample, [B].
    x0: data, [B, ...].

  Returns:
    States, float32 [B, ...].

  Example:
    >>> from sdiff_jax.samplers import solvers
    >>> tableau = solvers.build(sigma_d=0.5, name="ddim", steps=4)
    >>> sample_noised(tableau, keys_from_seeds(np.arange(3)), jnp.ones((3, 2))).shape
    (3, 2)
  """
  prior = sample_prior(tableau, keys, x0.shape[1:])
  return jnp.asarray(tableau.alpha[0], prior.dtype) * x0 + prior


def with_optimization_barrier(
  denoiser: Denoiser, x: Array, time: Array, cond: Cond
) -> Array:
  """Returns denoiser(x, time, cond), compiled in the same way in every program.

  Args:
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...].
    x: states, [N, ...].
    time: [N].
    cond: conditions, leading [N].
  """
  x, time, cond = jax.lax.optimization_barrier((x, time, cond))
  return jax.lax.optimization_barrier(denoiser(x, time, cond))


def sample(
  denoiser: Denoiser, tableau: SolverTableau, x: Array, keys: PRNGKey, cond: Cond
) -> Array:
  """Returns the last state of a solver's recurrence (see `tableau`).

  Args:
    denoiser: (x [B, ...], time [B], cond) -> d [B, ...].
    tableau: the solver.
    x: initial states, [B, ...] (see `sample_prior`).
    keys: one key a sample, [B]; unused by a solver without noise.
    cond: conditions, leading [B].

  Returns:
    The last states, [B, ...].

  Example:
    >>> from sdiff_jax.samplers import solvers
    >>> tableau = solvers.build(sigma_d=0.5, name="ddim", steps=4)
    >>> keys = keys_from_seeds(np.arange(3))
    >>> x = sample_prior(tableau, keys, (2, 2))
    >>> sample(lambda x, time, cond: 0 * x, tableau, x, keys, None).shape
    (3, 2, 2)
  """
  return states(denoiser, tableau, x, keys, cond, only_last=True)[-1]


def states(
  denoiser: Denoiser,
  tableau: SolverTableau,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  *,
  only_last: bool = False,
  unroll: int = 1,
) -> Array:
  """Returns all states of a solver's recurrence, [R + 1, B, ...], the first one first.

  Args:
    denoiser: see `sample`.
    tableau: see `sample`.
    x: see `sample`.
    keys: see `sample`.
    cond: see `sample`.
    only_last: whether the states before the last are left out.
    unroll: number of steps in one iteration of the loop.

  Example:
    >>> from sdiff_jax.samplers import solvers
    >>> tableau = solvers.build(sigma_d=0.5, name="ddim", steps=4)
    >>> keys = keys_from_seeds(np.arange(3))
    >>> x = sample_prior(tableau, keys, (2, 2))
    >>> states(lambda x, time, cond: 0 * x, tableau, x, keys, None).shape
    (5, 3, 2, 2)
  """
  # A time for each sample, as in a parallel sampler, where they differ.
  times = jnp.asarray(tableau.time, x.dtype)[:, None]
  times = jnp.broadcast_to(times, (tableau.evaluations, x.shape[0]))
  steps = jnp.arange(tableau.evaluations)
  shape = x.shape[1:]

  def solver_step(carry: PyTree, inputs: PyTree) -> tuple[PyTree, Array | None]:
    x, previous_x, history = carry
    coefficients, times, i = inputs
    z_before = noise_before(keys, i, shape) if tableau.uses_noise_before else None
    x = tableau_lib.add_noise(coefficients, x, z_before)
    d = with_optimization_barrier(denoiser, x, times, cond)
    states = [x, previous_x] if tableau.uses_previous_state else [x]
    z = noise(keys, i, shape) if tableau.uses_noise else None
    denoised = [d, *history]
    new = tableau_lib.apply_step(coefficients, states, denoised, z)
    return (new, x, denoised[: len(history)]), None if only_last else new

  history = [jnp.zeros_like(x)] * (tableau.history - 1)
  inputs: PyTree = (
    tableau.coefficients(x.dtype),
    times,
    steps,
  )
  start: PyTree = (x, x, history)
  (last, *_), after = jax.lax.scan(solver_step, start, inputs, unroll=unroll)
  return last[None] if after is None else jnp.concatenate([x[None], after])


@registry.register("samplers", "sequential", prefix="")
def run(
  denoiser: Denoiser,
  tableau: SolverTableau,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  *,
  record: bool | None = None,
) -> Samples:
  """Runs the steps of a solver sequentially; the sampling loop of a solver's own name.

  Args:
    denoiser: see `sample`.
    tableau: see `sample`.
    x: see `sample`.
    keys: see `sample`.
    cond: see `sample`.
    record: whether all states are returned.
  """
  count = jnp.full(x.shape[:1], tableau.evaluations, jnp.int32)
  zero = jnp.zeros(x.shape[:1])
  all_states = states(denoiser, tableau, x, keys, cond, only_last=not record)
  zero = zero.astype(x.dtype)
  recorded = jnp.moveaxis(all_states, 0, 1) if record else None
  return Samples(all_states[-1], count, count, zero, zero, recorded)
