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

from sdiff_jax.interfaces import Array, Cond, Denoiser, PRNGKey
from sdiff_jax.samplers import sequential
from sdiff_jax.samplers.tables import Table

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
  """Where each sample is; j counts from the window's first state, `begin`.

  Attributes:
    begin: states before this one are done, int32 [B].
    x: states, [B, W + 1, ...].
    z: noise of rows, [B, W, ...], or [B, W, 1, ...] of zeros for a table without.
    x_1: the state before `begin`, [B, ...].
    d_1: the denoiser at that state, [B, ...].
    d_2: the denoiser at the state before that, [B, ...].
    before: states and Phi of the pass before, each [B, W, ...] (`secant` alone).
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
      state and leaves them theirs, as arXiv:2305.16317 does.
    callback: called on the host before each pass with (rows done [B], their last
      state [B, ...], the denoiser there a pass ago [B, ...]): a preview; None for none.

  Returns:
    A Result. Every sample has its own window; all is one loop on the device.

  Raises:
    ValueError: a window, tolerance or rule that does not exist.
  """
  rows, published = table.evaluations, rule == "published"
  _check(rows, window, tolerance, rule)
  noisy = bool(table.s.any())
  columns = {n: jnp.asarray(getattr(table, n), x.dtype) for n in table._fields[:-1]}
  scale = jnp.asarray(_scale(table, published), x.dtype)
  count, slots = len(x), jnp.arange(window, dtype=jnp.int32)[None]
  none = jnp.zeros_like(x)

  def at(begin: Array) -> dict[str, Array]:
    """Returns the coefficients of the window's rows, [B, W, 1, ...] each."""
    i = jnp.minimum(begin[:, None] + slots, rows - 1)
    return {name: _wide(column[i], x.ndim + 1) for name, column in columns.items()}

  def draw(begin: Array) -> Array:
    if not noisy:
      return jnp.zeros((count, window, *(1,) * (x.ndim - 1)), x.dtype)
    return jax.vmap(
      lambda key, i: jax.vmap(lambda i: sequential.noise(key[None], i, x.shape[1:])[0])(
        i
      )
    )(keys, begin[:, None] + slots)

  cond_rows = jax.tree.map(lambda c: jnp.repeat(c, window, axis=0), cond)

  def evaluate(now: Window, times: Array) -> Array:
    flat = now.x[:, :window].reshape(count * window, *x.shape[1:])
    d = sequential.apart(denoiser, flat, times.reshape(-1), cond_rows)
    return d.reshape(count, window, *x.shape[1:])

  def one_pass(carry: tuple[Window, Result]) -> tuple[Window, Result]:
    now, result = carry
    if callback is not None:
      jax.debug.callback(callback, now.begin, now.x[:, 0], now.d_1, ordered=True)
    row = at(now.begin)
    d = evaluate(now, row["time"])
    old = now.x[:, :window]
    d_1 = _after(now.d_1, d)
    d_2 = jnp.concatenate([now.d_2[:, None], d_1[:, :-1]], axis=1)
    x_1 = _after(now.x_1, old)
    phi = sequential.advance(row, x=old, x_1=x_1, d=d, d_1=d_1, d_2=d_2, z=now.z)
    A = RULES[rule](row, old, phi, now.before)
    new = _recur(phi, A, row["p"], now.x)
    left = rows - now.begin  # rows, of which some of the window's may be none
    change = _mean_square(new[:, 1:] - now.x[:, 1:])
    allowed = scale[jnp.minimum(now.begin[:, None] + 1 + slots, rows)]
    ulps = ULPS * jnp.finfo(x.dtype).eps
    floor = ulps**2 * _mean_square(new[:, 1:])
    good = change <= jnp.maximum((tolerance * allowed) ** 2, floor)
    ahead = jnp.cumprod(good.astype(jnp.int32), axis=1)  # 1 up to the first that failed
    stride = jnp.minimum(1 + ahead.sum(1, dtype=jnp.int32), window)
    stride = jnp.minimum(stride, left)
    counts = (slots < (stride - 1)[:, None]) & (change > floor)
    relative = change**0.5 / jnp.where(allowed > 0, allowed, 1)
    error = jnp.max(jnp.where(counts, relative, 0), axis=1)
    active = (left > 0).astype(jnp.int32)
    result = Result(
      now.x[:, 0],
      result.passes + active,
      result.evaluations + jnp.clip(left, 0, window),
      jnp.maximum(result.error, error),
    )
    begin = now.begin + stride
    z = draw(begin)
    moved = _shift(new, stride)
    last = jnp.minimum(left, window)  # index of the last state that is one
    if not published:
      frozen = _pick(d, jnp.maximum(last - 1, 0))
      moved = _roll_out(moved, last - stride, at(begin), z, frozen)
    else:
      index = jnp.arange(window + 1, dtype=jnp.int32)[None] <= (last - stride)[:, None]
      final = _pick(new, last)[:, None]
      moved = jnp.where(_wide(index, x.ndim + 1), moved, final)
    stay = _wide(stride == 0, x.ndim)
    back = jnp.maximum(stride - 1, 0)
    following = Window(
      begin,
      moved,
      z,
      jnp.where(stay, now.x_1, _pick(new, back)),
      jnp.where(stay, now.d_1, _pick(d, back)),
      jnp.where(stay, now.d_2, _pick(d_1, back)),
      tuple(_shift(v, stride) for v in (old, phi)) if rule == "secant" else (),
    )
    return following, result

  begin = jnp.zeros(count, jnp.int32)
  z = draw(begin)
  states = jnp.repeat(x[:, None], window + 1, axis=1)
  if not published:
    states = _roll_out(states, jnp.zeros_like(begin), at(begin), z, none)
  empty = jnp.full_like(states[:, :window], jnp.nan)
  before = (empty, empty) if rule == "secant" else ()
  zero = jnp.zeros(count, jnp.int32)
  carry = (
    Window(begin, states, z, x, none, none, before),
    Result(x, zero, zero, jnp.zeros(count, x.dtype)),
  )
  now, result = jax.lax.while_loop(
    lambda carry: jnp.any(carry[0].begin < rows), one_pass, carry
  )
  return result._replace(x=now.x[:, 0])


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


def _check(rows: int, window: int, tolerance: float, rule: str) -> None:
  if not 1 <= window <= rows:
    raise ValueError(
      f"sampler.window={window}: take 1 to {rows}, the rows of the table"
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


def _wide(a: Array, ndim: int) -> Array:
  """Returns a with axes of length 1 at its end."""
  return a.reshape(*a.shape, *(1,) * (ndim - a.ndim))


def _mean_square(x: Array) -> Array:
  """Returns the mean of x^2 over a sample, [B, W]."""
  return jnp.mean(jnp.square(x), tuple(range(2, x.ndim)))


def _after(first: Array, rest: Array) -> Array:
  """Returns (first, rest_0, ..., rest_{W-2}), [B, W, ...]."""
  return jnp.concatenate([first[:, None], rest[:, :-1]], axis=1)


def _pick(x: Array, j: Array) -> Array:
  """Returns x[k, j[k]], [B, ...]."""
  return jax.vmap(lambda row, j: row[j])(x, j)


def _shift(x: Array, by: Array) -> Array:
  """Returns x[k, j + by[k]], its last entry where there is none."""
  most = x.shape[1] - 1
  index = by[:, None] + jnp.arange(x.shape[1], dtype=by.dtype)[None]
  index = jnp.minimum(index, most)
  return jax.vmap(lambda row, i: row[i])(x, index)


def _recur(phi: Array, A: Array, p: Array, old: Array) -> Array:
  """Returns the new states, [B, W + 1, ...]; one row after the other."""

  def row(carry: tuple[Array, Array], inputs: tuple) -> tuple:
    delta, delta_1 = carry
    phi, A, p, old = inputs
    new = phi + A * delta + p * delta_1
    return (new - old, delta), new

  none = jnp.zeros_like(phi[:, 0])
  inputs = (phi, jnp.broadcast_to(A, (*phi.shape[:2], *A.shape[2:])), p, old[:, 1:])
  _, new = jax.lax.scan(
    row, (none, none), jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), inputs)
  )
  return jnp.concatenate([old[:, :1], jnp.moveaxis(new, 0, 1)], axis=1)


def _roll_out(x: Array, known: Array, row: dict, z: Array, d: Array) -> Array:
  """Returns the states with those after `known` [B] made from d frozen at `d`."""

  def step(carry: tuple[Array, Array], inputs: tuple) -> tuple:
    x_0, x_1 = carry
    j, old, row, z = inputs
    new = row["a"] * x_0 + row["p"] * x_1 + (row["b"] + row["c"] + row["e"]) * d
    new += row["s"] * z
    new = jnp.where(_wide(j < known, old.ndim), old, new)
    return (new, x_0), new

  by_row = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x[:, 1:], row, z))
  inputs = (jnp.arange(x.shape[1] - 1, dtype=known.dtype), *by_row)
  _, rest = jax.lax.scan(step, (x[:, 0], x[:, 0]), inputs)
  return jnp.concatenate([x[:, :1], jnp.moveaxis(rest, 0, 1)], axis=1)
