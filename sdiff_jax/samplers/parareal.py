"""Parareal: a fast solver's sweep, corrected by a slow one in parallel (SRDS).

The rows of a table are cut into blocks. F_n runs the rows of block n, all blocks at
once; G_n jumps over the block with a coarse solver, one block after the other:

    U_{n+1}^{k+1} = F_n(U_n^k) + G_n(U_n^{k+1}) - G_n(U_n^k),

and after k sweeps the first k states are those of the table (Lions, Maday, Turinici
2001; arXiv:2412.08292). The coarse solver is one step of DDIM with a denoiser of its
own, which may be a consistency model.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sdiff_jax.interfaces import Array, Cond, Denoiser
from sdiff_jax.samplers import sequential
from sdiff_jax.samplers.ring import Ring, over_rows, wide
from sdiff_jax.samplers.tables import UNIT, Table
from sdiff_jax.samplers.windows import Result


def check(table: Table, tolerance: float) -> None:
  """Raises a ValueError for a table with noise or history, or a bad tolerance."""
  if table.uses("p", "c", "e", "s"):
    raise ValueError(
      "sampler.name: parareal takes solvers of one row a step without noise: srdsddim"
    )
  if not 0 <= tolerance < float("inf"):
    raise ValueError(f"sampler.tolerance={tolerance}: take 0 or more")


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
  coarse: Denoiser,
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
    coarse: denoiser of the sweep, which jumps over a block by DDIM: `denoiser`
      again, or a consistency model, whose d is where the trajectory ends.
    blocks: K.
    tolerance: largest change of the last state between two sweeps, as a root mean
      square, in units of UNIT of the data's standard deviation.
    sharding: of the axes [B, K]; None on one device.

  Returns:
    A Result; `passes` counts calls of either denoiser that wait for one another,
    `evaluations` those of `denoiser` alone, `error` the last change.

  Raises:
    ValueError: a table with noise or history, or blocks that do not exist.
  """
  check(table, tolerance)
  starts = boundaries(table.evaluations, blocks)
  a, b, times = (jnp.asarray(c, x.dtype) for c in (*_jumps(table, starts), table.time))
  ring, size = Ring(blocks, sharding), -(-table.evaluations // blocks)
  evaluate = over_rows(ring, denoiser, cond)

  def fine(states: Array) -> Array:
    """Returns F_n of the state at the start of every block [B, K, ...]."""

    def row(j: Array, now: Array) -> Array:
      i = jnp.asarray(starts) + j
      there = i < table.evaluations
      i = jnp.minimum(i, table.evaluations - 1)
      row = {
        k: wide(jnp.asarray(getattr(table, k), x.dtype)[i][None], now.ndim)
        for k in "ab"
      }
      d = evaluate(now, jnp.broadcast_to(times[i][None], now.shape[:2]))
      new = sequential.advance(row, x=now, d=d)
      return jnp.where(wide(there[None], now.ndim), new, now)

    return jax.lax.fori_loop(0, size, row, states)

  def coarse_step(n: Array, now: Array) -> Array:
    time = jnp.broadcast_to(times[jnp.asarray(starts)[n]], now.shape[:1])
    d = sequential.apart(coarse, now, time, cond)
    return sequential.advance({"a": a[n], "b": b[n]}, x=now, d=d)

  def sweep(correction: Array) -> tuple[Array, Array]:
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
    new, end, jumped = sweep(after - jumped)
    change = jnp.sqrt(jnp.mean(jnp.square(end - last), tuple(range(1, x.ndim))))
    change = change / (UNIT * table.sigma_d)
    # Samples that are done stay as they are, whatever their batch goes on with.
    keep = lambda old, new: jnp.where(wide(done, new.ndim), old, new)  # noqa: E731
    last = keep(last, end)
    sweeps = k + (~done).astype(jnp.int32)
    done = done | (change <= tolerance) | (sweeps >= blocks)
    return sweeps, new, last, jumped, done, change

  states, last, jumped = sweep(jnp.zeros((len(x), blocks, *x.shape[1:]), x.dtype))
  zero = jnp.zeros(len(x), jnp.int32)
  carry = (zero, states, last, jumped, zero > 0, jnp.zeros(len(x), x.dtype))
  k, _, last, _, _, change = jax.lax.while_loop(
    lambda carry: ~carry[4].all(), one_sweep, carry
  )
  passes = blocks + k * (size + blocks)
  none = jnp.zeros_like(change)
  return Result(last, passes, k * table.evaluations, change, none)


def _jumps(table: Table, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns a and b of DDIM from each start to the next, float64 [K].

  The rows' own a and b tell it: DDIM steps with one d make one DDIM step.
  """
  ends = np.append(starts[1:], table.evaluations)
  a, b = np.ones(len(starts)), np.zeros(len(starts))
  for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
    for i in range(start, end):
      a[n], b[n] = table.a[i] * a[n], table.a[i] * b[n] + table.b[i]
  return a, b
