"""A window of states that moves without moving its states: state i is in slot i mod W.

Arrays are [B, W, ...], and each sample has a window of its own, states begin to
begin + W - 1. As the window goes on, the slots that it leaves are those that new
states enter; so an axis of slots that is spread over devices stays where it is. What
devices tell each other is the state at the edge between two of them, and one total
a device for each recurrence.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdiff_jax.samplers import sequential
from sdiff_jax.types import Array, Cond, Denoiser


class RingBuffer(NamedTuple):
  """Where slots are.

  Attributes:
    window: W.
    sharding: of the axes [B, W]; None on one device.
  """

  window: int
  sharding: NamedSharding | None = None

  def parts(self, axis: int) -> int:
    """Returns over how many devices axis 0 (samples) or 1 (slots) is spread."""
    if self.sharding is None:
      return 1
    names = (*self.sharding.spec, None, None)[axis]
    names = (names,) if isinstance(names, str) else names or ()
    return int(np.prod([self.sharding.mesh.shape[name] for name in names]))

  def place(self, x: Array, *axes: int | None) -> Array:
    """Returns x with its leading axes spread as `axes` of the ring; None for whole."""
    if self.sharding is None:
      return x
    spec = (*self.sharding.spec, None, None)
    names = [None if axis is None else spec[axis] for axis in axes]
    sharding = NamedSharding(self.sharding.mesh, P(*names))
    return jax.lax.with_sharding_constraint(x, sharding)

  def spread(self, x: Array) -> Array:
    """Returns x [B, W, ...], spread."""
    return self.place(x, 0, 1)


def slot_offset(ring: RingBuffer, begin: Array) -> Array:
  """Returns how far after its sample's `begin` [B] the state of a slot is, [B, W]."""
  slots = jnp.arange(ring.window, dtype=begin.dtype)[None]
  return ring.spread((slots - begin[:, None]) % ring.window)


def wide(a: Array, ndim: int) -> Array:
  """Returns a with axes of length 1 at its end."""
  return a.reshape(*a.shape, *(1,) * (ndim - a.ndim))


def gather_slot(x: Array, chosen: Array) -> Array:
  """Returns the x [B, W, ...] of the one slot that is chosen [B, W], [B, ...]."""
  return jnp.sum(jnp.where(wide(chosen, x.ndim), x, 0), axis=1)


def flatten(ring: RingBuffer, x: Array) -> Array:
  """Returns x [B, W, ...] as [N, ...], device by device, so that none sends a row."""
  b, w = ring.parts(0), ring.parts(1)
  x = x.reshape(b, x.shape[0] // b, w, x.shape[1] // w, *x.shape[2:])
  x = jnp.swapaxes(x, 1, 2)
  return x.reshape(-1, *x.shape[4:])


def unflatten(ring: RingBuffer, x: Array) -> Array:
  """Returns what `flatten` made flat, [B, W, ...]."""
  b, w = ring.parts(0), ring.parts(1)
  x = x.reshape(b, w, -1, ring.window // w, *x.shape[1:])
  x = jnp.swapaxes(x, 1, 2)
  return ring.spread(x.reshape(-1, ring.window, *x.shape[4:]))


def map_slots(
  ring: RingBuffer, denoiser: Denoiser, cond: Cond
) -> Callable[[Array, Array], Array]:
  """Returns (x [B, W, ...], time [B, W]) -> d [B, W, ...], one call of the denoiser."""
  cond_rows = jax.tree.map(
    lambda c: flatten(ring, jnp.repeat(c[:, None], ring.window, axis=1)), cond
  )

  def evaluate(x: Array, time: Array) -> Array:
    flat = flatten(ring, x), flatten(ring, time)
    return unflatten(
      ring, sequential.with_optimization_barrier(denoiser, *flat, cond_rows)
    )

  return evaluate


def solve(ring: RingBuffer, coefficients: list[Array], r: Array) -> Array:
  """Returns y with y_j = r_j + sum_k coefficients[k]_j y_{j-1-k}, around the ring.

  Args:
    ring: the slots.
    coefficients: of the values before, the nearest first, [B, W, 1, ...] each. Some
      sample's j must cut the ring: as many neighbours as there are coefficients must
      have none but zeros.
    r: [B, W, ...].

  Returns:
    y, [B, W, ...], in a number of steps that grows with log W.
  """
  blocks = ring.parts(1)

  def by_block(x: Array) -> Array:
    return x.reshape(len(x), blocks, ring.window // blocks, *x.shape[2:])

  order = len(coefficients)
  rows = [[by_block(c) for c in coefficients]]
  one, zero = jnp.ones_like(rows[0][0]), jnp.zeros_like(rows[0][0])
  rows += [[one if k == i else zero for k in range(order)] for i in range(order - 1)]
  r = by_block(r)
  values = [r] + [jnp.zeros_like(r)] * (order - 1)
  matrix, value = jax.lax.associative_scan(_after, (rows, values), axis=2)
  # One total for each block, on every device: twice around, to be past any cut.
  totals = jax.tree.map(lambda x: ring.place(x[:, :, -1], 0, None), (matrix, value))

  def pass_block(y: list[Array], total: tuple) -> tuple[list[Array], list[Array]]:
    return _apply(*total, y), y

  twice = jax.tree.map(lambda x: jnp.moveaxis(jnp.tile(x, _by(x, 2)), 1, 0), totals)
  start = [jnp.zeros_like(v[0]) for v in twice[1]]
  _, incoming = jax.lax.scan(pass_block, start, twice)
  incoming = [jnp.moveaxis(y[blocks:], 0, 1)[:, :, None] for y in incoming]
  y = value[0] + product(matrix[0], incoming)
  return ring.spread(y.reshape(len(y), ring.window, *y.shape[3:]))


def _by(x: Array, times: int) -> tuple[int, ...]:
  """Returns what repeats axis 1."""
  return (1, times, *(1,) * (x.ndim - 2))


def product(row: list[Array], y: list[Array]) -> Array:
  """Returns row y; 0 times anything is 0, so that nothing gets past a cut."""
  return sum(jnp.where(m == 0, 0, m * x) for m, x in zip(row, y, strict=True))


def _apply(matrix: list, value: list[Array], y: list[Array]) -> list[Array]:
  """Returns matrix y + value."""
  return [product(row, y) + v for row, v in zip(matrix, value, strict=True)]


def _after(first: tuple, second: tuple) -> tuple[list, list]:
  """Returns the affine map that applies `first`, then `second`."""
  columns = list(zip(*first[0], strict=True))
  matrix = [[product(row, c) for c in columns] for row in second[0]]
  return matrix, _apply(*second, first[1])
