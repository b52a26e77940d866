"""A sliding window whose states stay in place: state i is in slot i mod W.

Arrays are [B, W, ...], and each sample has its own window, states begin to begin + W -
1. As a window advances, new states enter the slots that others leave, so a slot axis
that is sharded over devices stays where it is. Devices exchange only the state at the
edge between two of them, and one total each for a recurrence.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdiff_jax.samplers import sequential
from sdiff_jax.types import Array, Cond, Denoiser, PyTree

Matrix = list[list[Array]]
AffineMap = tuple[Matrix, list[Array]]


class RingBuffer(NamedTuple):
  """The slots of a window.

  Attributes:
    window: number of slots W.
    sharding: of the axes [B, W]; None on one device.
  """

  window: int
  sharding: NamedSharding | None = None

  def num_shards(self, axis: int) -> int:
    """Returns over how many devices axis 0 (samples) or 1 (slots) is sharded."""
    if self.sharding is None:
      return 1
    names = (*self.sharding.spec, None, None)[axis]
    names = (names,) if isinstance(names, str) else names or ()
    return int(np.prod([self.sharding.mesh.shape[name] for name in names]))

  def with_axes(self, x: Array, *axes: int | None) -> Array:
    """Returns x with its leading axes sharded like axes of the ring; None for whole."""
    if self.sharding is None:
      return x
    spec = (*self.sharding.spec, None, None)
    names = [None if axis is None else spec[axis] for axis in axes]
    sharding = NamedSharding(self.sharding.mesh, P(*names))
    return jax.lax.with_sharding_constraint(x, sharding)

  def with_sharding(self, x: Array) -> Array:
    """Returns x [B, W, ...] with the sharding of the ring."""
    return self.with_axes(x, 0, 1)


def slot_offset(ring: RingBuffer, begin: Array) -> Array:
  """Returns the position of each slot's state in its window, int32 [B, W].

  Args:
    ring: the slots.
    begin: the first state of each window, int32 [B].
  """
  slots = jnp.arange(ring.window, dtype=begin.dtype)[None]
  return ring.with_sharding((slots - begin[:, None]) % ring.window)


def wide(a: Array, ndim: int) -> Array:
  """Returns an array with trailing axes of length 1, up to a number of axes."""
  return a.reshape(*a.shape, *(1,) * (ndim - a.ndim))


def gather_slot(x: Array, is_slot: Array) -> Array:
  """Returns x in one slot of each window.

  Args:
    x: [B, W, ...].
    is_slot: true in exactly one slot of each window, bool [B, W].

  Returns:
    [B, ...].
  """
  return jnp.sum(jnp.where(wide(is_slot, x.ndim), x, 0), axis=1)


def first_state(x: Array, steps: int) -> Array:
  """Returns a record of all states with its first one, [B, steps + 1, ...].

  Args:
    x: the first states, [B, ...].
    steps: number of steps after it.
  """
  record = jnp.zeros((len(x), steps + 1, *x.shape[1:]), x.dtype)
  return record.at[:, 0].set(x)


def put_states(
  record: Array | None, begin: Array, offset: Array, stride: Array, new: Array
) -> Array | None:
  """Returns the record with the states that an update of a window accepts.

  Args:
    record: states in order, [B, R + 1, ...]; None for no record.
    begin: first step of each window, int32 [B].
    offset: positions of the steps in the window, int32 [B, W].
    stride: number of steps that are accepted, int32 [B].
    new: the states that the steps produce, [B, W, ...].
  """
  if record is None:
    return None
  beyond = record.shape[1]  # is dropped
  state = jnp.where(offset < stride[:, None], begin[:, None] + offset + 1, beyond)
  rows = jnp.arange(len(record))[:, None]
  return record.at[rows, state].set(new, mode="drop")


def flatten(ring: RingBuffer, x: Array) -> Array:
  """Returns x [B, W, ...] as [B W, ...], ordered so that no device sends its part."""
  b, w = ring.num_shards(0), ring.num_shards(1)
  x = x.reshape(b, x.shape[0] // b, w, x.shape[1] // w, *x.shape[2:])
  x = jnp.swapaxes(x, 1, 2)
  return x.reshape(-1, *x.shape[4:])


def unflatten(ring: RingBuffer, x: Array) -> Array:
  """Returns the inverse of `flatten`, [B, W, ...]."""
  b, w = ring.num_shards(0), ring.num_shards(1)
  x = x.reshape(b, w, -1, ring.window // w, *x.shape[1:])
  x = jnp.swapaxes(x, 1, 2)
  return ring.with_sharding(x.reshape(-1, ring.window, *x.shape[4:]))


def map_slots(
  ring: RingBuffer, denoiser: Denoiser, cond: Cond
) -> Callable[[Array, Array], Array]:
  """Returns a function that evaluates the denoiser in all slots with one call.

  Args:
    ring: the slots.
    denoiser: (x [N, ...], time [N], cond) -> d [N, ...]; N = B W.
    cond: conditions, leading [B].

  Returns:
    (x [B, W, ...], time [B, W]) -> d [B, W, ...].
  """
  cond = jax.tree.map(
    lambda c: flatten(ring, jnp.repeat(c[:, None], ring.window, axis=1)), cond
  )

  def evaluate(x: Array, time: Array) -> Array:
    x, time = flatten(ring, x), flatten(ring, time)
    d = sequential.with_optimization_barrier(denoiser, x, time, cond)
    return unflatten(ring, d)

  return evaluate


def solve(ring: RingBuffer, coefficients: list[Array], r: Array) -> Array:
  """Solves y_j = r_j + sum_k coefficients[k]_j y_{j-1-k} around the ring.

  Args:
    ring: the slots.
    coefficients: of the previous values, the nearest first, [B, W, 1, ...] each. Each
      sample's ring must be cut somewhere: as many neighboring slots as there are
      coefficients must have no nonzero coefficient of a value before the cut.
    r: [B, W, ...].

  Returns:
    y, [B, W, ...], in a number of operations in sequence that grows with log W.
  """
  num_blocks = ring.num_shards(1)

  def by_block(x: Array) -> Array:
    return x.reshape(len(x), num_blocks, ring.window // num_blocks, *x.shape[2:])

  order = len(coefficients)
  coefficients = jnp.broadcast_arrays(*coefficients)  # some may be scalars of a slot
  matrix = [[by_block(c) for c in coefficients]]
  one, zero = jnp.ones_like(matrix[0][0]), jnp.zeros_like(matrix[0][0])
  matrix += [[one if k == i else zero for k in range(order)] for i in range(order - 1)]
  r = by_block(r)
  values = [r] + [jnp.zeros_like(r)] * (order - 1)
  matrix, value = jax.lax.associative_scan(_compose, (matrix, values), axis=2)
  # One total for each block, on every device: twice around, to be past any cut.
  totals = jax.tree.map(lambda x: ring.with_axes(x[:, :, -1], 0, None), (matrix, value))

  def pass_block(y: list[Array], total: PyTree) -> tuple[list[Array], list[Array]]:
    matrix, value = total
    return _apply(matrix, value, y), y

  twice = jax.tree.map(lambda x: jnp.moveaxis(_repeat_blocks(x, 2), 1, 0), totals)
  start = [jnp.zeros_like(v[0]) for v in twice[1]]
  _, incoming = jax.lax.scan(pass_block, start, twice)
  incoming = [jnp.moveaxis(y[num_blocks:], 0, 1)[:, :, None] for y in incoming]
  y = value[0] + product(matrix[0], incoming)
  return ring.with_sharding(y.reshape(len(y), ring.window, *y.shape[3:]))


def _repeat_blocks(x: Array, times: int) -> Array:
  """Returns x with axis 1 repeated."""
  return jnp.tile(x, (1, times, *(1,) * (x.ndim - 2)))


def product(row: list[Array], y: list[Array]) -> Array:
  """Returns sum_k row_k y_k, where 0 times anything is 0, so nothing passes a cut."""
  terms = [jnp.where(m == 0, 0, m * x) for m, x in zip(row, y, strict=True)]
  return cast(Array, sum(terms))


def _apply(matrix: Matrix, value: list[Array], y: list[Array]) -> list[Array]:
  """Returns matrix y + value."""
  return [product(row, y) + v for row, v in zip(matrix, value, strict=True)]


def _compose(first: AffineMap, second: AffineMap) -> AffineMap:
  """Returns the affine map that applies `first`, then `second`."""
  columns = [[*column] for column in zip(*first[0], strict=True)]
  matrix = [[product(row, c) for c in columns] for row in second[0]]
  return matrix, _apply(*second, first[1])
