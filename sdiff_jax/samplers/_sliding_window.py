"""A window that moves over the rows of a solver table, many evaluated at a time.

A pass evaluates the denoiser at all states of the window at once. Phi_i being row i
of the table, what a state's change says of the states after it is carried on by

    new_{i+1} = Phi_i(old) + A_i (new_i - old_i) + A'_i (new_{i-1} - old_{i-1}) + ...,

and the window moves to the first state that is not done. `paradigms` and
`speculative` say what A is and which states are done. The first state of a window is
the sequential sampler's, so Phi of it is too: each pass does one row at least.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdiff_jax.samplers import _secant, sequential
from sdiff_jax.samplers._ring_buffer import (
  RingBuffer,
  gather_slot,
  map_slots,
  product,
  slot_offset,
  solve,
  wide,
)
from sdiff_jax.samplers.solvers import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, PRNGKey

TERMS = ("a", "p", "b", "c", "e", "s", "alpha", "gain")
# Called on the host in each pass with (rows done [B], their last state [B, ...], the
# denoiser there [B, ...]): a preview.
Callback = Callable[[Array, Array, Array], None]


class Samples(NamedTuple):
  """What came out, and what it took.

  Attributes:
    x: the last states, [B, ...].
    num_iterations: calls of the denoiser that a sample took part in, int32 [B].
    num_evaluations: states of the sample that these evaluated, int32 [B].
    error: largest change of a state that was taken for done, as a root mean square
      in the tolerance's unit, float32 [B].
    tv_bound: sum over those of |change| / (2 s), s being the noise that leaves the
      state: a bound of the total variation to the law of one row after the other, if
      each change is at least what is missing (arXiv:2305.16317, section 3.3); infinite
      where no noise follows a change; float32 [B].
  """

  x: Array
  num_iterations: Array
  num_evaluations: Array
  error: Array
  tv_bound: Array


class WindowState(NamedTuple):
  """Where each sample is; state i of [begin, begin + W) is in slot i mod W.

  Attributes:
    begin: states before this one are done, int32 [B].
    x: states, [B, W, ...].
    z: noise of the rows that start there, [B, W, ...]; None for a table without.
    x_1: the state before `begin`, [B, ...].
    d_1: the denoiser at that state, [B, ...].
    d_2: the denoiser at the state before that, [B, ...].
    before: states and d of the pass before, each [B, W, ...].
    seen: states that were in the window of the pass before, int32 [B].
    spread: variance of the data as it shows here, in that of all, [B, 1, ...]; it
      makes the first guess of dd/dx (see `slopes`).
  """

  begin: Array
  x: Array
  z: Array | None
  x_1: Array
  d_1: Array
  d_2: Array
  before: tuple[Array, Array]
  seen: Array
  spread: Array


class Iteration(NamedTuple):
  """The rows of a window with the denoiser evaluated; all are [B, W, ...].

  Attributes:
    begin: states before this one are done, int32 [B].
    k: rank of the row, 0 for that of `begin`, int32 [B, W].
    row: columns of the table by name.
    x: the states that rows start from.
    old: the states that rows make, as they were; meaningless at the last rank.
    phi: what rows make of x.
    z: their noise.
    factors: A, A', ..., as many as the table looks back; 0 where the ring is cut.
  """

  begin: Array
  k: Array
  row: dict[str, Array]
  x: Array
  old: Array
  phi: Array
  z: Array | None
  factors: list[Array]


class UpdateRule(NamedTuple):
  """How a window is improved.

  Attributes:
    factors: (row, (dd/dx of x_i, of x_{i-1}, of x_{i-2}), [B, W, ...] each) ->
      (A, A', A''), which broadcast against them.
    improve: Pass -> (new states at the slots of the rows that make them [B, W, ...],
      rows done, of those left [B], largest accepted change [B], their variation [B]).
    published: fill the window with copies of its last state, and forget the d before
      it, as arXiv:2305.16317 does; else new states are rolled out with their own
      noise and the last d, which changes by the table's gain.
  """

  factors: Callable[[dict, tuple[Array, ...]], tuple[Array, ...]]
  improve: Callable[[Iteration], tuple[Array, Array, Array, Array]]
  published: bool = False


def check_window(tableau: SolverTableau, window: int) -> None:
  """Raises a ValueError for a window that does not fit the tableau; 0 is unset."""
  if not 0 <= window <= tableau.evaluations:
    raise ValueError(
      f"window={window}: must be 1 to {tableau.evaluations}, the number of solver steps"
    )


def sliding_window(
  denoiser: Denoiser,
  table: SolverTableau,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  ring: RingBuffer,
  method: UpdateRule,
  callback: Callback | None = None,
  max_iterations: int = 0,
) -> Samples:
  """Returns the last state of the recurrence of `tables`; one loop on the device.

  Args:
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...]; N = B W.
    table: the solver.
    x: first state, [B, ...] (see `sequential.initial`).
    keys: one key a sample, [B]; unused by a table without noise.
    cond: conditions, leading [B].
    ring: the window; every sample has its own.
    method: how it is improved.
    callback: see Callback; None for none.
    max_iterations: most calls of the denoiser. A sample that is not done by then is what
      the last call made of the last state of its window; 0 for as many as it takes.

  Raises:
    ValueError: a window that does not fit the table or the devices.
  """
  check_window(table, ring.window)
  if ring.window % ring.parts(1):
    raise ValueError(
      f"window={ring.window}: does not divide over the {ring.parts(1)} devices "
      "of the mesh's axis window"
    )
  rows = _Rows(ring, table, keys, method)
  evaluate = map_slots(ring, denoiser, cond)

  def one_pass(carry: tuple[WindowState, Samples]) -> tuple[WindowState, Samples]:
    now, result = carry
    d = evaluate(now.x, rows.time(now))
    if callback is not None:
      here = slot_offset(ring, now.begin) == 0
      jax.debug.callback(
        callback, now.begin, gather_slot(now.x, here), gather_slot(d, here)
      )
    return rows.step(now, result, d)

  def going(carry: tuple[WindowState, Samples]) -> Array:
    now, result = carry
    left = now.begin < table.evaluations
    if max_iterations:
      left &= result.num_iterations < max_iterations
    return jnp.any(left)

  now, result = jax.lax.while_loop(going, one_pass, rows.start(x))
  last = gather_slot(now.x, slot_offset(ring, now.begin) == 0)
  if 0 < max_iterations < table.evaluations:
    done = wide(now.begin >= table.evaluations, x.ndim)
    last = jnp.where(done, last, gather_slot(now.before[1], rows.latest(now)))
  return result._replace(x=last)


def propagate_change(
  ring: RingBuffer, factors: list[Array], phi: Array, old: Array
) -> Array:
  """Returns the new states by the recurrence above, at the slots of their rows."""
  delta = solve(ring, factors, phi - old)
  behind = [jnp.roll(delta, n + 1, axis=1) for n in range(len(factors))]
  return phi + product(factors, behind)


class _Rows(NamedTuple):
  """All that a pass does beside the denoiser."""

  ring: RingBuffer
  table: SolverTableau
  keys: PRNGKey
  method: UpdateRule

  def column(self, name: str, i: Array, like: Array) -> Array:
    """Returns a column of the table at rows i [B, W], [B, W, 1, ...]."""
    column = jnp.asarray(getattr(self.table, name), like.dtype)
    return wide(column[jnp.clip(i, 0, len(column) - 1)], like.ndim)

  def time(self, now: WindowState) -> Array:
    """Returns what the denoiser is told in each slot, [B, W]."""
    i = now.begin[:, None] + slot_offset(self.ring, now.begin)
    return jnp.asarray(self.table.time, now.x.dtype)[
      jnp.minimum(i, self.table.evaluations - 1)
    ]

  def latest(self, now: WindowState) -> Array:
    """Returns the slot of the last row that the pass before evaluated, [B, W]."""
    begin = now.begin - (self.ring.window - now.seen)
    end = jnp.minimum(begin + self.ring.window, self.table.evaluations)
    return slot_offset(self.ring, begin) == (end - begin - 1)[:, None]

  def noise(self, begin: Array, shape: tuple[int, ...]) -> Array | None:
    """Returns the noise of the window's rows, [B, W, *shape]."""
    if not self.table.uses("s"):
      return None
    one = lambda key, i: sequential.noise(key[None], i, shape)[0]  # noqa: E731
    draw = jax.vmap(jax.vmap(one, in_axes=(None, 0)))
    return self.ring.spread(
      draw(self.keys, begin[:, None] + slot_offset(self.ring, begin))
    )

  def start(self, x: Array) -> tuple[WindowState, Samples]:
    """Returns the first window, rolled out for Gaussian data."""
    zero, none = jnp.zeros(len(x), jnp.int32), jnp.zeros_like(x)
    states = self.ring.spread(jnp.repeat(x[:, None], self.ring.window, axis=1))
    z, spread = self.noise(zero, x.shape[1:]), wide(jnp.ones(len(x), x.dtype), x.ndim)
    now = WindowState(zero, states, z, x, none, none, (states, states), zero, spread)
    now = now._replace(x=self.enter(now, zero, none))
    return now, Samples(x, zero, zero, *[jnp.zeros(len(x), x.dtype)] * 2)

  def step(
    self, now: WindowState, result: Samples, d: Array
  ) -> tuple[WindowState, Samples]:
    """Improves the states by their d, and moves the window on."""
    table, published = self.table, self.method.published
    k = slot_offset(self.ring, now.begin)
    first = wide(k == 0, d.ndim)

    def one_ago(x: Array, before: Array) -> Array:
      return jnp.where(first, before[:, None], jnp.roll(x, 1, axis=1))

    d_1 = d_2 = x_1 = None
    if table.uses("p"):
      x_1 = one_ago(now.x, now.x_1)
    if table.uses("c", "e"):
      d_1 = one_ago(d, now.d_1)
      d_1 = jnp.where(first, d, d_1) if published else d_1  # a step of first order
    if table.uses("e"):
      d_2 = one_ago(d_1, now.d_2)
    row = {name: self.column(name, now.begin[:, None] + k, d) for name in TERMS}
    phi = sequential.apply_step(row, x=now.x, x_1=x_1, d=d, d_1=d_1, d_2=d_2, z=now.z)
    slope, spread = _secant.estimate_slopes(now, k, row, d)
    ago = tuple(jnp.roll(slope, n, axis=1) for n in range(3))
    factors = self.method.factors(row, ago)[: self.order]
    factors = [jnp.where(wide(k <= n, d.ndim), 0, f) for n, f in enumerate(factors)]
    old = jnp.roll(now.x, -1, axis=1)
    done = Iteration(now.begin, k, row, now.x, old, phi, now.z, factors)
    new, stride, error, variation = self.method.improve(done)
    left = table.evaluations - now.begin
    result = Samples(
      result.x,
      result.num_iterations + (left > 0).astype(jnp.int32),
      result.num_evaluations + jnp.clip(left, 0, self.ring.window),
      jnp.maximum(result.error, error),
      result.tv_bound + variation,
    )
    last = k == (stride - 1)[:, None]  # of the rows that are done now
    states = jnp.roll(new, 1, axis=1)  # in their own slots
    moved = WindowState(
      now.begin + stride,
      states,
      self.noise(now.begin + stride, d.shape[2:]),
      gather_slot(jnp.where(first, now.x, states), last)
      if table.uses("p")
      else now.x_1,
      gather_slot(d, last) if table.uses("c", "e") else now.d_1,
      gather_slot(d_1, last) if table.uses("e") else now.d_2,
      (now.x, d),
      self.ring.window - stride,
      spread,
    )
    offset = gather_slot(d - row["gain"] * now.x, k == self.ring.window - 1)
    moved = moved._replace(x=self.enter(moved, now.begin + self.ring.window, offset))
    keep = lambda a, b: jnp.where(wide(stride > 0, a.ndim), a, b)  # noqa: E731
    return jax.tree.map(keep, moved, now), result

  @property
  def order(self) -> int:
    """Returns how many states before it a row's new state depends on."""
    return 3 if self.table.uses("e") else 2 if self.table.uses("p", "c") else 1

  def enter(self, now: WindowState, known: Array, offset: Array) -> Array:
    """Returns the states, those after `known` [B] made with d = gain x + offset."""
    ndim, k = now.x.ndim, slot_offset(self.ring, now.begin)
    i = now.begin[:, None] + k  # of the state, which the row before makes
    fixed = wide(i <= known[:, None], ndim)
    row = {name: self.column(name, i - 1, now.x) for name in TERMS}
    if self.method.published:
      row = dict.fromkeys(row, jnp.zeros_like(row["a"])) | {
        "a": jnp.ones_like(row["a"])
      }
    weight = row["b"] + row["c"] + row["e"]
    made = weight * offset[:, None]
    if now.z is not None:
      made += row["s"] * jnp.roll(now.z, 1, axis=1)
    factors = [jnp.where(fixed, 0, row["a"] + weight * row["gain"])]
    if self.table.uses("p"):
      second = wide(k == 1, ndim)  # whose x_{i-2} has left the window
      made += jnp.where(second, row["p"] * now.x_1[:, None], 0)
      factors.append(jnp.where(fixed | second, 0, row["p"]))
    return solve(self.ring, factors, jnp.where(fixed, now.x, made))
