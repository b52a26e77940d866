"""Parareal: a fast solver's sweep, corrected by a slow one in parallel (SRDS).

The rows of a table are cut into blocks. F_n runs the rows of block n, all blocks at
once; G_n runs a coarse table's rows from the block's start to its end, one block after
the other:

    U_{n+1}^{k+1} = F_n(U_n^k) + G_n(U_n^{k+1}) - G_n(U_n^k),

and after k sweeps the first k states are those of the table (Lions, Maday, Turinici
2001; arXiv:2412.08292). The coarse solver may have a denoiser of its own, such as a
consistency model.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sdiff_jax import registry
from sdiff_jax.samplers import sequential
from sdiff_jax.samplers._ring_buffer import RingBuffer, map_slots, wide
from sdiff_jax.samplers._sliding_window import Samples
from sdiff_jax.samplers.solvers import TOLERANCE_UNIT, SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, PRNGKey


def check(table: SolverTableau, tolerance: float) -> None:
  """Raises a ValueError for a table with noise or a bad tolerance."""
  if table.uses("s"):
    raise ValueError("name: parareal takes solvers without noise: srdsddim")
  if not 0 <= tolerance < float("inf"):
    raise ValueError(f"tolerance={tolerance}: take 0 or more")


def boundaries(rows: int, blocks: int) -> np.ndarray:
  """Returns the first row of each block, int [blocks]; the last may be shorter.

  Raises:
    ValueError: blocks that do not exist.
  """
  size = -(-rows // blocks) if 1 <= blocks <= rows else 0
  if not size or size * (blocks - 1) >= rows:
    raise ValueError(
      f"window={blocks}: {rows} rows cannot be cut into so many blocks of one "
      f"size; take {max(1, round(rows**0.5))}"
    )
  return np.arange(blocks) * size


def check_blocks(table: SolverTableau, starts: np.ndarray) -> None:
  """Raises a ValueError if a block's first row needs what was before the block."""
  later = np.minimum(starts + 1, table.evaluations - 1)
  first = [getattr(table, k)[starts[1:]] for k in "pce"]
  if np.any(first) or np.any(table.e[later[1:]]):
    raise ValueError(
      "name: parareal takes solvers that remember no step before the one they "
      f"take, such as srdsddim, and blocks of whole steps; not rows {starts.tolist()}"
    )


def coarse_solver(table: SolverTableau, starts: np.ndarray) -> SolverTableau:
  """Returns the coarse table that jumps over each block by one step of DDIM.

  The rows' own a and b tell it, where they are DDIM's: such steps with one d make one
  step.

  Raises:
    ValueError: the table's rows are not DDIM's.
  """
  if table.uses("p", "c", "e"):
    raise ValueError("coarse_table: needed, since the table's rows are not DDIM's")
  ends = np.append(starts[1:], table.evaluations)
  a, b = np.ones(len(starts)), np.zeros(len(starts))
  for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
    for i in range(start, end):
      a[n], b[n] = table.a[i] * a[n], table.a[i] * b[n] + table.b[i]
  rows = {k: v[starts] for k, v in table._asdict().items() if np.ndim(v)}
  return table._replace(**rows | {"a": a, "b": b})


def integrate(
  table: SolverTableau,
  start: Array,
  size: int,
  x: Array,
  evaluate: Callable[..., Array],
) -> Array:
  """Returns the state after `size` rows from `start`, or after the table's last one.

  Args:
    table: without noise; rows of one block do not look before it.
    start: the first row, int [...].
    size: rows.
    x: states, [B, ..., *shape].
    evaluate: (x, time [...]) -> d like x.
  """
  names = [k for k in "apbce" if k in "ab" or table.uses(k)]
  columns = {k: jnp.asarray(getattr(table, k), x.dtype) for k in (*names, "time")}

  def row(carry: tuple[Array, ...], j: Array) -> tuple:
    x, x_1, d_1, d_2 = carry
    there = start + j < table.evaluations
    now = {k: v[jnp.minimum(start + j, len(v) - 1)] for k, v in columns.items()}
    d = evaluate(x, now.pop("time"))
    now = {k: wide(v[None], x.ndim) for k, v in now.items()}
    new = sequential.apply_step(
      now,
      x=x,
      x_1=x_1 if "p" in now else None,
      d=d,
      d_1=d_1 if "c" in now else None,
      d_2=d_2 if "e" in now else None,
    )
    return (jnp.where(wide(there[None], x.ndim), new, x), x, d, d_1), None

  none = jnp.zeros_like(x)
  return jax.lax.scan(row, (x, x, none, none), jnp.arange(size))[0][0]


def sample(
  denoiser: Denoiser,
  table: SolverTableau,
  x: Array,
  cond: Cond,
  *,
  coarse: Denoiser,
  coarse_table: SolverTableau | None = None,
  blocks: int,
  tolerance: float,
  sharding: NamedSharding | None = None,
) -> Samples:
  """Returns the last state of the recurrence of `tables`, of an ODE's solver.

  Args:
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...]; N = B blocks.
    table: the slow solver, without noise; no block of it looks before its start.
    x: first state, [B, ...].
    cond: conditions, leading [B].
    coarse: denoiser of the sweep: `denoiser` again, or a consistency model, whose d
      is where the trajectory ends.
    coarse_table: the sweep's solver, whose rows, cut into K blocks as the table's, are
      at the same times where blocks start; None for `coarse_solver`.
    blocks: K.
    tolerance: largest change of the last state between two sweeps, as a root mean
      square, in units of UNIT of the data's standard deviation.
    sharding: of the axes [B, K]; None on one device.

  Returns:
    A Result; `passes` counts calls of either denoiser that wait for one another,
    `evaluations` those of `denoiser` alone, `error` the last change.

  Raises:
    ValueError: a table with noise or with history across blocks, blocks that do not
      exist, or a coarse table of other times.
  """
  check(table, tolerance)
  starts = boundaries(table.evaluations, blocks)
  check_blocks(table, starts)
  if coarse_table is None:
    coarse_table = coarse_solver(table, starts)
  coarse_starts = boundaries(coarse_table.evaluations, blocks)
  check(coarse_table, tolerance)
  check_blocks(coarse_table, coarse_starts)
  if not np.allclose(coarse_table.time[coarse_starts], table.time[starts]):
    raise ValueError("coarse_table: its blocks start at other times than the table's")
  ring, size = RingBuffer(blocks, sharding), -(-table.evaluations // blocks)
  coarse_size = -(-coarse_table.evaluations // blocks)
  evaluate = map_slots(ring, denoiser, cond)

  def fine(states: Array) -> Array:
    """Returns F_n of the state at the start of every block [B, K, ...]."""

    def of_rows(x: Array, time: Array) -> Array:
      return evaluate(x, jnp.broadcast_to(time[None], x.shape[:2]))

    return integrate(table, jnp.asarray(starts), size, states, of_rows)

  def coarse_step(n: Array, now: Array) -> Array:
    """Returns G_n of the state at the start of block n [B, ...]."""

    def of_row(x: Array, time: Array) -> Array:
      return sequential.with_optimization_barrier(
        coarse, x, jnp.broadcast_to(time, len(x)), cond
      )

    first = jnp.asarray(coarse_starts)[n]
    return integrate(coarse_table, first, coarse_size, now, of_row)

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
    change = change / (TOLERANCE_UNIT * table.sigma_d)
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
  swept = coarse_table.evaluations
  passes = swept + k * (size + swept)
  none = jnp.zeros_like(change)
  return Samples(last, passes, k * table.evaluations, change, none)


def check_options(tableau: SolverTableau, options: dict[str, Any]) -> dict[str, Any]:
  """Returns the options, with a number of blocks if there is none.

  Raises:
    ValueError: a tableau with noise or with history, or an option that does not fit.
  """
  check(tableau, options["tolerance"])
  if tableau.uses("p", "c", "e"):
    raise ValueError("name: of the solvers, parareal takes ddim alone: srdsddim")
  blocks = options["window"] or round(tableau.evaluations**0.5)
  boundaries(tableau.evaluations, blocks)
  return options | {"window": blocks}


@registry.register(
  "samplers", "parareal", prefix="srds", aliases=("parareal",), check=check_options
)
def sample_by_name(
  denoiser: Denoiser,
  tableau: SolverTableau,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  *,
  window: int = 0,
  tolerance: float = 0.1,
  sharding: NamedSharding | None = None,
  coarse_denoiser: Denoiser | None = None,
) -> Samples:
  """Returns what `sample` does, under the arguments that all sampling loops share.

  Args:
    denoiser: see `sample`.
    tableau: of a solver without noise.
    x: first states, [B, ...].
    keys: not used: there is no noise.
    cond: conditions, leading [B].
    window: number of blocks.
    tolerance: see `sample`.
    sharding: see `sample`.
    coarse_denoiser: of the sequential sweep; None for `denoiser`.
  """
  del keys
  return sample(
    denoiser,
    tableau,
    x,
    cond,
    coarse=coarse_denoiser or denoiser,
    blocks=window,
    tolerance=tolerance,
    sharding=sharding,
  )
