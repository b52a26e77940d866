"""Parareal: a fast solver's sweep, corrected by a slow one in parallel (SRDS).

The rows of a table are cut into blocks. F_n runs the rows of block n, all blocks at
once; G_n jumps over the block with a coarse solver, one block after the other:

    U_{n+1}^{k+1} = F_n(U_n^k) + G_n(U_n^{k+1}) - G_n(U_n^k),

and after k sweeps the first k states are those of the table (Lions, Maday, Turinici
2001; arXiv:2412.08292). The coarse solver has a denoiser of its own, which may be a
consistency model.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sdiff_jax.interfaces import Array, Cond, Denoiser
from sdiff_jax.samplers import sequential
from sdiff_jax.samplers.ring import Ring, flatten, unflatten, wide
from sdiff_jax.samplers.tables import Table
from sdiff_jax.samplers.windows import Result


def boundaries(rows: int, blocks: int) -> np.ndarray:
  """Returns the first row of each block, int [blocks]; the last may be shorter.

  Raises:
    ValueError: blocks that do not exist.
  """
  size = -(-rows // blocks) if 1 <= blocks <= rows else 0
  if not size or size * (blocks - 1) >= rows:
    raise ValueError(
      f"sampler.window={blocks}: {rows} rows cannot be cut into so many blocks of one "
      f"size; take {max(1, round(rows**0.5))}"
    )
  return np.arange(blocks) * size


def sample(
  denoiser: Denoiser,
  table: Table,
  x: Array,
  cond: Cond,
  *,
  coarse: tuple[Denoiser, Table],
  blocks: int,
  tolerance: float,
  sharding: NamedSharding | None = None,
) -> Result:
  """Returns the last state of the recurrence of `tables`, of an ODE's solver.

  Args:
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...]; N = B blocks.
    table: the slow solver, without noise and history.
    x: first state, [B, ...].
    cond: conditions, leading [B].
    coarse: denoiser and solver of one row a block, such as DDIM at `boundaries`.
    blocks: K.
    tolerance: largest change of the last state between two sweeps, as a root mean
      square, in units of the first one's standard deviation.
    sharding: of the axes [B, K]; None on one device.

  Returns:
    A Result; `passes` counts calls of either denoiser that wait for one another,
    `evaluations` those of `denoiser` alone, `error` the last change.

  Raises:
    ValueError: a table with noise or history, or blocks that do not exist.
  """
  if table.uses("p", "c", "e", "s"):
    raise ValueError("sampler.name: parareal takes solvers of one row a step: ddim")
  starts = boundaries(table.evaluations, blocks)
  jump, rough = coarse
  if rough.evaluations != blocks or rough.uses("p", "c", "e", "s"):
    raise ValueError(f"the coarse table must be DDIM's of {blocks} rows")
  ring, size = Ring(blocks, sharding), int(starts[1]) if blocks > 1 else len(table.time)
  cond_rows = jax.tree.map(
    lambda c: flatten(ring, jnp.repeat(c[:, None], blocks, axis=1)), cond
  )

  def fine(states: Array) -> Array:
    """Returns F_n of the state at the start of every block [B, K, ...]."""

    def row(j: Array, now: Array) -> Array:
      i = jnp.asarray(starts) + j
      there = i < table.evaluations
      i = jnp.minimum(i, table.evaluations - 1)
      a, b, time = (
        jnp.asarray(getattr(table, name), x.dtype)[i][None]
        for name in ("a", "b", "time")
      )
      times = flatten(ring, jnp.broadcast_to(time, now.shape[:2]))
      d = unflatten(
        ring, sequential.apart(denoiser, flatten(ring, now), times, cond_rows)
      )
      row = {"a": wide(a, now.ndim), "b": wide(b, now.ndim)}
      new = _advance(row, now, d)
      return jnp.where(wide(there[None], now.ndim), new, now)

    return jax.lax.fori_loop(0, size, row, states)

  def coarse_step(n: Array, now: Array) -> Array:
    a, b, time = (
      jnp.asarray(getattr(rough, k), x.dtype)[n] for k in ("a", "b", "time")
    )
    d = sequential.apart(jump, now, jnp.broadcast_to(time, now.shape[:1]), cond)
    return _advance({"a": a, "b": b}, now, d)

  def sweep(states: Array, correction: Array) -> tuple[Array, Array]:
    """Returns the states [B, K, ...], the last one, and G_n of each."""

    def block(now: Array, inputs: tuple) -> tuple:
      n, right = inputs
      jumped = coarse_step(n, now)
      return right + jumped, (now, jumped)

    inputs = (jnp.arange(blocks), jnp.moveaxis(correction, 1, 0))
    last, (states, jumped) = jax.lax.scan(block, x, inputs)
    return jnp.moveaxis(states, 0, 1), last, jnp.moveaxis(jumped, 0, 1)

  def one_sweep(carry: tuple) -> tuple:
    k, states, last, jumped, done, _ = carry
    after = fine(states)
    new, end, jumped = sweep(states, after - jumped)
    change = jnp.sqrt(jnp.mean(jnp.square(end - last), tuple(range(1, x.ndim))))
    change = change / table.init_std
    # Samples that are done stay as they are, whatever their batch goes on with.
    keep = lambda old, new: jnp.where(wide(done, new.ndim), old, new)  # noqa: E731
    last = keep(last, end)
    sweeps = k + (~done).astype(jnp.int32)
    done = done | (change <= tolerance) | (sweeps >= blocks)
    return sweeps, new, last, jumped, done, change

  states, last, jumped = sweep(x, jnp.zeros((len(x), blocks, *x.shape[1:]), x.dtype))
  zero = jnp.zeros(len(x), jnp.int32)
  carry = (zero, states, last, jumped, zero > 0, jnp.zeros(len(x), x.dtype))
  k, _, last, _, _, change = jax.lax.while_loop(
    lambda carry: ~carry[4].all(), one_sweep, carry
  )
  passes = blocks + k * (size + blocks)
  return Result(last, passes, k * table.evaluations, change)


def _advance(row: dict, x: Array, d: Array) -> Array:
  return sequential.advance(row, x=x, d=d, x_1=None, d_1=None, d_2=None, z=None)
