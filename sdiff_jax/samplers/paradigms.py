"""ParaDiGMS: the rows of a solver table, many at a time (arXiv:2305.16317).

A pass evaluates the denoiser at all states of a window at once, and improves them by

    new_{i+1} = Phi_i(old) + A_i (new_i - old_i) + p_i (new_{i-1} - old_{i-1}),

Phi_i being row i of the table; then the window moves to the first state that has
changed by more than the tolerance. The states before it are done. With tolerance 0
the result is that of `sequential`, to the bit where a denoiser treats its rows alike.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sdiff_jax.interfaces import Array, Cond, Denoiser, PRNGKey
from sdiff_jax.samplers import sequential
from sdiff_jax.samplers.ring import (
  Ring,
  flatten,
  pick,
  product,
  rank,
  solve,
  unflatten,
  wide,
)
from sdiff_jax.samplers.tables import Table

TERMS = ("a", "p", "b", "c", "e", "s", "alpha")
ULPS = 4  # changes of so many units in the last place count as none


class Result(NamedTuple):
  """What came out, and what it took.

  Attributes:
    x: the last states, [B, ...].
    passes: calls of the denoiser that a sample took part in, int32 [B].
    evaluations: states of the sample that these evaluated, int32 [B].
    error: largest accepted change, as a root mean square over the tolerance's scale,
      float32 [B].
  """

  x: Array
  passes: Array
  evaluations: Array
  error: Array


class Window(NamedTuple):
  """Where each sample is; state i of [begin, begin + W) is in slot i mod W.

  Attributes:
    begin: states before this one are done, int32 [B].
    x: states, [B, W, ...].
    z: noise of the rows that start there, [B, W, ...], or of length 1 beyond W for a
      table without.
    x_1: the state before `begin`, [B, ...].
    d_1: the denoiser at that state, [B, ...].
    d_2: the denoiser at the state before that, [B, ...].
    before: states and Phi of the pass before, each [B, W, ...], NaN for states new to
      the window (`secant` alone).
  """

  begin: Array
  x: Array
  z: Array
  x_1: Array
  d_1: Array
  d_2: Array
  before: tuple[Array, Array]


def sample(
  denoiser: Denoiser,
  table: Table,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  *,
  window: int,
  tolerance: float,
  rule: str = "secant",
  sharding: NamedSharding | None = None,
  callback: Callable[[Array, Array, Array], None] | None = None,
) -> Result:
  """Returns the last state of the recurrence of `tables`, found in parallel.

  Args:
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...]; N = B window.
    table: the solver.
    x: first state, [B, ...] (see `sequential.initial`).
    keys: one key a sample, [B]; unused by a table without noise.
    cond: conditions, leading [B].
    window: rows evaluated at once, W.
    tolerance: largest change of an accepted state, as a root mean square, in units of
      the table's scale there.
    rule: how changes carry on (A above), a key of RULES. States new to a window are
      rolled out with the last d and their own noise, and the last states, which no
      noise follows, have the scale of those before; but "published" copies the last
      state, leaves them theirs, and forgets the d before the window, as
      arXiv:2305.16317 does.
    sharding: of the axes [B, W]; None on one device.
    callback: called on the host in each pass with (rows done [B], their last state
      [B, ...], the denoiser there [B, ...]): a preview; None for none.

  Returns:
    A Result. Every sample has its own window; all is one loop on the device.

  Raises:
    ValueError: a window, tolerance or rule that does not exist.
  """
  ring = Ring(window, sharding)
  _check(table.evaluations, ring, tolerance, rule)
  solver = _Solver(ring, table, keys, rule, tolerance, x.dtype)
  cond_rows = jax.tree.map(
    lambda c: flatten(ring, jnp.repeat(c[:, None], window, axis=1)), cond
  )

  def one_pass(carry: tuple[Window, Result]) -> tuple[Window, Result]:
    now, result = carry
    times = flatten(ring, solver.time(now.begin))
    d = sequential.apart(denoiser, flatten(ring, now.x), times, cond_rows)
    d = unflatten(ring, d)
    if callback is not None:
      here = rank(ring, now.begin) == 0
      jax.debug.callback(callback, now.begin, pick(now.x, here), pick(d, here))
    return solver.step(now, result, d)

  now, result = jax.lax.while_loop(
    lambda carry: jnp.any(carry[0].begin < table.evaluations),
    one_pass,
    solver.start(x),
  )
  return result._replace(x=pick(now.x, rank(ring, now.begin) == 0))


class _Solver(NamedTuple):
  """All that a pass does beside the denoiser."""

  ring: Ring
  table: Table
  keys: PRNGKey
  rule: str
  tolerance: float
  dtype: jnp.dtype

  def column(self, name: str, i: Array, ndim: int) -> Array:
    """Returns a column of the table at rows i [B, W], [B, W, 1, ...]."""
    column = jnp.asarray(getattr(self.table, name), self.dtype)
    return wide(column[jnp.clip(i, 0, len(column) - 1)], ndim)

  def time(self, begin: Array) -> Array:
    """Returns what the denoiser is told in each slot, [B, W]."""
    return self.column("time", begin[:, None] + rank(self.ring, begin), 2)

  def noise(self, begin: Array, shape: tuple[int, ...]) -> Array | None:
    """Returns the noise of the window's rows, [B, W, *shape]."""
    if not self.table.uses("s"):
      return None
    one = lambda key, i: sequential.noise(key[None], i, shape)[0]  # noqa: E731
    draw = jax.vmap(jax.vmap(one, in_axes=(None, 0)))
    return self.ring.spread(draw(self.keys, begin[:, None] + rank(self.ring, begin)))

  def start(self, x: Array) -> tuple[Window, Result]:
    """Returns the first window, rolled out from d = 0."""
    zero, none = jnp.zeros(len(x), jnp.int32), jnp.zeros_like(x)
    states = self.ring.spread(jnp.repeat(x[:, None], self.ring.window, axis=1))
    empty = jnp.full_like(states, jnp.nan)
    before = (empty, empty) if self.rule == "secant" else ()
    z = self.noise(zero, x.shape[1:])
    now = Window(zero, states, z, x, none, none, before)
    now = now._replace(x=self.enter(now, zero, none))
    return now, Result(x, zero, zero, jnp.zeros(len(x), self.dtype))

  def step(self, now: Window, result: Result, d: Array) -> tuple[Window, Result]:
    """Improves the states by their d, and moves the window on."""
    table, ndim, k = self.table, d.ndim, rank(self.ring, now.begin)
    first, second = wide(k == 0, ndim), wide(k == 1, ndim)
    row = {name: self.column(name, now.begin[:, None] + k, ndim) for name in TERMS}

    def one_ago(x: Array, before: Array) -> Array:
      return jnp.where(first, before[:, None], jnp.roll(x, 1, axis=1))

    d_1 = d_2 = x_1 = None
    if table.uses("p"):
      x_1 = one_ago(now.x, now.x_1)
    if table.uses("c", "e"):
      d_1 = one_ago(d, now.d_1)
      d_1 = jnp.where(first, d, d_1) if self.rule == "published" else d_1
    if table.uses("e"):
      d_2 = one_ago(d_1, now.d_2)
    phi = sequential.advance(row, x=now.x, x_1=x_1, d=d, d_1=d_1, d_2=d_2, z=now.z)
    A = RULES[self.rule](row, now.x, phi, now.before)
    factors = [jnp.where(first, 0, A)]
    if table.uses("p"):
      factors.append(jnp.where(first | second, 0, row["p"]))
    # At a row's slot: the state that it makes, as it was.
    old = jnp.roll(now.x, -1, axis=1)
    delta = solve(self.ring, factors, phi - old)
    behind = [jnp.roll(delta, n + 1, axis=1) for n in range(len(factors))]
    new = phi + product(factors, behind)
    stride, error = self.judge(now.begin, k, new, new - old)
    left = table.evaluations - now.begin
    result = Result(
      result.x,
      result.passes + (left > 0).astype(jnp.int32),
      result.evaluations + jnp.clip(left, 0, self.ring.window),
      jnp.maximum(result.error, error),
    )
    last = k == (stride - 1)[:, None]  # of the rows that are done now
    states = jnp.roll(new, 1, axis=1)  # in their own slots
    done = Window(
      now.begin + stride,
      states,
      self.noise(now.begin + stride, d.shape[2:]),
      pick(jnp.where(first, now.x, states), last) if table.uses("p") else now.x_1,
      pick(d, last) if table.uses("c", "e") else now.d_1,
      pick(d_1, last) if table.uses("e") else now.d_2,
      (now.x, phi) if self.rule == "secant" else (),
    )
    frozen = pick(d, k == self.ring.window - 1)
    following = done._replace(
      x=self.enter(done, now.begin + self.ring.window, frozen),
      before=self.forget(done, now.begin + self.ring.window),
    )
    keep = lambda a, b: jnp.where(wide(stride > 0, a.ndim), a, b)  # noqa: E731
    return jax.tree.map(keep, following, now), result

  def judge(
    self, begin: Array, k: Array, new: Array, change: Array
  ) -> tuple[Array, Array]:
    """Returns the rows that are done [B], and the largest accepted change [B]."""
    published, rows = self.rule == "published", self.table.evaluations
    scale = jnp.asarray(_scale(self.table, published), self.dtype)
    allowed = scale[jnp.minimum(begin[:, None] + k + 1, rows)]
    change = _mean_square(change)
    ulps = ULPS * jnp.finfo(self.dtype).eps
    floor = ulps**2 * _mean_square(new)
    good = change <= jnp.maximum((self.tolerance * allowed) ** 2, floor)
    stride = 1 + jnp.min(jnp.where(good, self.ring.window - 1, k), axis=1)
    stride = jnp.minimum(stride, rows - begin)
    counts = (k < (stride - 1)[:, None]) & (change > floor)
    relative = change**0.5 / jnp.where(allowed > 0, allowed, 1)
    return stride, jnp.max(jnp.where(counts, relative, 0), axis=1)

  def enter(self, now: Window, known: Array, d: Array) -> Array:
    """Returns the states, those after `known` [B] rolled out with d [B, ...] frozen.

    Published: they are copies of the state `known`.
    """
    ndim, k = now.x.ndim, rank(self.ring, now.begin)
    i = now.begin[:, None] + k  # of the state; the row before makes it
    fixed = wide(i <= known[:, None], ndim)
    if self.rule == "published":
      one = jnp.ones_like(fixed, self.dtype)
      copied = solve(self.ring, [jnp.where(fixed, 0, one)], jnp.where(fixed, now.x, 0))
      return copied
    row = {name: self.column(name, i - 1, ndim) for name in TERMS}
    made = (row["b"] + row["c"] + row["e"]) * d[:, None]
    if self.table.uses("s"):
      made += row["s"] * jnp.roll(now.z, 1, axis=1)
    factors = [jnp.where(fixed, 0, row["a"])]
    if self.table.uses("p"):
      second = wide(k == 1, ndim)  # whose x_{i-2} has left the window
      made += jnp.where(second, row["p"] * now.x_1[:, None], 0)
      factors.append(jnp.where(fixed | second, 0, row["p"]))
    return solve(self.ring, factors, jnp.where(fixed, now.x, made))

  def forget(self, now: Window, end: Array) -> tuple[Array, ...]:
    """Returns what is known of the pass before, NaN at rows from `end` [B] on."""
    i = now.begin[:, None] + rank(self.ring, now.begin)
    seen = wide(i < end[:, None], now.x.ndim)
    return tuple(jnp.where(seen, v, jnp.nan) for v in now.before)


def _scale(table: Table, published: bool) -> np.ndarray:
  """Returns the unit of errors of states 0 to R, float64 [R + 1]."""
  scale = np.append(table.scale, 0.0)
  if published:  # states that must not change at all
    scale[:-1] = np.maximum(scale[:-1], 1e-10)
    return scale
  known = np.flatnonzero(scale > 0)
  if not known.size:
    return scale
  return np.where(np.arange(len(scale)) > known[-1], scale[known[-1]], scale)


def _check(rows: int, ring: Ring, tolerance: float, rule: str) -> None:
  if not 1 <= ring.window <= rows:
    raise ValueError(
      f"sampler.window={ring.window}: take 1 to {rows}, the rows of the table"
    )
  if ring.window % ring.parts(1):
    raise ValueError(
      f"sampler.window={ring.window}: does not divide over the {ring.parts(1)} devices "
      "of mesh.window"
    )
  if not 0 <= tolerance < float("inf"):
    raise ValueError(f"sampler.tolerance={tolerance}: take 0 or more")
  if rule not in RULES:
    raise ValueError(f"sampler.rule={rule!r}: take one of {[*RULES]}")


def _picard(row: dict, old: Array, phi: Array, before: tuple) -> Array:
  return 1 - row["p"]


def _linear(row: dict, old: Array, phi: Array, before: tuple) -> Array:
  return row["a"]


def _secant(row: dict, old: Array, phi: Array, before: tuple) -> Array:
  """A = <dX, dPhi> / <dX, dX>, from 0 <= dD/dx <= 1 / alpha in [a, a + b / alpha].

  At the first visit dD/dx = alpha, right for data of about unit variance.
  """
  dx, dphi = old - before[0], phi - before[1]
  axes = tuple(range(2, old.ndim))
  dot, square = (jnp.sum(dx * v, axes, keepdims=True) for v in (dphi, dx))
  most = row["a"] + row["b"] / row["alpha"]
  low, high = jnp.minimum(row["a"], most), jnp.maximum(row["a"], most)
  first = row["a"] + row["b"] * row["alpha"]
  measured = jnp.where(square > 0, dot / jnp.where(square > 0, square, 1), first)
  return jnp.clip(jnp.where(jnp.isnan(measured), first, measured), low, high)


# How a change of a state carries on to the next one: (row, old, phi, before) -> A.
RULES: dict[str, Callable[..., Array]] = {
  "published": _picard,
  "picard": _picard,
  "linear": _linear,
  "secant": _secant,
}


def _mean_square(x: Array) -> Array:
  """Returns the mean of x^2 over a sample, [B, W]."""
  return jnp.mean(jnp.square(x), tuple(range(2, x.ndim)))
