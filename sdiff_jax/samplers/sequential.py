"""Runs a solver table, one row after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.samplers.solvers import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, PRNGKey


def noise(keys: PRNGKey, i: Array | int, shape: tuple[int, ...]) -> Array:
  """Returns the noise of row i, [B, *shape]; sample k's depends on keys[k] alone.

  Row -1 is the initial state's.
  """

  def draw(key: PRNGKey) -> Array:
    return jax.random.normal(jax.random.fold_in(key, i + 1), shape, jnp.float32)

  return jax.lax.optimization_barrier(jax.vmap(draw)(keys))


def sample_prior(table: SolverTableau, keys: PRNGKey, shape: tuple[int, ...]) -> Array:
  """Returns the first state, N(0, init_std^2), [B, *shape]."""
  return table.init_std * noise(keys, -1, shape)


def with_optimization_barrier(
  denoiser: Denoiser, x: Array, time: Array, cond: Cond
) -> Array:
  """Returns denoiser(x, time, cond), compiled alike in every program."""
  x, time, cond = jax.lax.optimization_barrier((x, time, cond))
  return jax.lax.optimization_barrier(denoiser(x, time, cond))


def apply_step(row: dict[str, Array], **state: Array | None) -> Array:
  """Returns a x + p x_1 + b d + c d_1 + e d_2 + s z, rounded alike in every program.

  A compiler may fuse a product into the sum that follows, which rounds once instead
  of twice, and it chooses by what stands around: so products are made apart.

  Args:
    row: coefficients by name, each of a shape that broadcasts.
    **state: x, x_1, d, d_1, d_2 and z: states and denoised, now, one and two rows
      ago, and noise; none, or None, where the table does not use it.
  """
  names = zip("apbces", ("x", "x_1", "d", "d_1", "d_2", "z"), strict=True)
  terms = [row[k] * state[v] for k, v in names if state.get(v) is not None]
  # What stands between a product and its sum, so that nothing makes one of both.
  terms = [jnp.maximum(term, jnp.finfo(term.dtype).min) for term in terms]
  return functools.reduce(jnp.add, terms)


def sample(
  denoiser: Denoiser, table: SolverTableau, x: Array, keys: PRNGKey, cond: Cond
) -> Array:
  """Returns the last state of the recurrence of `tables`, [B, ...].

  Args:
    denoiser: (x [B, ...], time [B], cond) -> d [B, ...].
    table: the solver.
    x: first state, [B, ...] (see `sample_prior`).
    keys: one key a sample, [B]; unused by a table without noise.
    cond: conditions, leading [B].
  """
  columns = {n: jnp.asarray(getattr(table, n), x.dtype) for n in (*"apbces", "time")}
  rows = jnp.arange(table.evaluations)
  # A time for each sample, as in a parallel sampler, where they differ.
  times = jnp.repeat(columns["time"][:, None], len(x), axis=1)

  def row(carry: tuple[Array, ...], inputs: tuple) -> tuple:
    x, x_1, d_1, d_2 = carry
    row, times, i = inputs
    d = with_optimization_barrier(denoiser, x, times, cond)
    new = apply_step(
      row,
      x=x,
      x_1=x_1 if table.uses("p") else None,
      d=d,
      d_1=d_1 if table.uses("c", "e") else None,
      d_2=d_2 if table.uses("e") else None,
      z=noise(keys, i, x.shape[1:]) if table.uses("s") else None,
    )
    return (new, x, d, d_1), None

  none = jnp.zeros_like(x)
  (x, *_), _ = jax.lax.scan(row, (x, x, none, none), (columns, times, rows))
  return x


def keys_from_seeds(seeds: np.ndarray) -> PRNGKey:
  """Returns one key for each integer seed [B]."""
  return jax.vmap(jax.random.key)(seeds)
