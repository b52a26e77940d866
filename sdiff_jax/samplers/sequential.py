"""Runs a solver table, one row after the other."""

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.interfaces import Array, Cond, Denoiser, PRNGKey
from sdiff_jax.samplers.tables import Table


def noise(keys: PRNGKey, i: Array | int, shape: tuple[int, ...]) -> Array:
  """Returns the noise of row i, [B, *shape]; sample k's depends on keys[k] alone.

  Row -1 is the initial state's.
  """

  def draw(key: PRNGKey) -> Array:
    return jax.random.normal(jax.random.fold_in(key, i + 1), shape, jnp.float32)

  return jax.vmap(draw)(keys)


def initial(table: Table, keys: PRNGKey, shape: tuple[int, ...]) -> Array:
  """Returns the first state, N(0, init_std^2), [B, *shape]."""
  return table.init_std * noise(keys, -1, shape)


def sample(
  denoiser: Denoiser, table: Table, x: Array, keys: PRNGKey, cond: Cond
) -> Array:
  """Returns the last state of the recurrence of `tables`, [B, ...].

  Args:
    denoiser: (x [B, ...], time [B], cond) -> d [B, ...].
    table: the solver.
    x: first state, [B, ...] (see `initial`).
    keys: one key a sample, [B]; unused by a table without noise.
    cond: conditions, leading [B].
  """
  noisy = bool(table.s.any())
  columns = jax.tree.map(lambda c: jnp.asarray(c, x.dtype), table[:-1])
  rows = jnp.arange(table.evaluations)

  def row(carry: tuple[Array, ...], inputs: tuple) -> tuple:
    x, x_1, d_1, d_2 = carry
    (a, p, b, c, e, s, time), i = inputs
    d = denoiser(x, jnp.full(x.shape[:1], time), cond)
    new = a * x + p * x_1 + b * d + c * d_1 + e * d_2
    if noisy:
      new += s * noise(keys, i, x.shape[1:])
    return (new, x, d, d_1), None

  none = jnp.zeros_like(x)
  (x, *_), _ = jax.lax.scan(row, (x, x, none, none), (columns, rows))
  return x


def keys_of(seeds: np.ndarray) -> PRNGKey:
  """Returns one key for each integer seed [B]."""
  return jax.vmap(jax.random.key)(seeds)
