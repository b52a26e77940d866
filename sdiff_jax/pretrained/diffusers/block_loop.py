"""Blocks of a network one after another, or in a loop that XLA compiles once.

The parameters decide. As a folder names them, {"transformer_blocks.0": ..., ...}, the
blocks follow one another. `stacked` puts the weights of alike neighbors into arrays with
one more axis, {"transformer_blocks.0-18": ...}, over which the same network loops. Both
are the same function, up to rounding. Files, checkpoints and adapters have the names of a
folder; weights are stacked after they are read.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdiff_jax.models.layers import common
from sdiff_jax.types import Array, Params, PyTree

STACK = re.compile(r"(.+)\.(\d+)-(\d+)")  # list of blocks, first and last index
Carry = tuple[PyTree, ...]


def run(
  parent: nn.Module,
  name: str,
  indices: range,
  block: type[nn.Module],
  fields: Callable[[int], Mapping[str, object]],
  carry: Carry,
  *args: PyTree,
  remat: str = "",
) -> Carry:
  """Returns what blocks make of values, one after another, inside a compact module.

  Args:
    parent: the module that the blocks belong to.
    name: of the list of blocks; block i is "name.i", or in a stack "name.first-last".
    indices: of the blocks, ascending.
    block: (*carry, *args) -> next carry, or its only element.
    fields: index -> fields of the block, the same for all blocks of a stack.
    carry: values that the first block takes.
    *args: further values, that all blocks take.
    remat: what a block recomputes in the backward pass, a key of `common.KEEPS`.
  """
  params = parent.variables.get("params", {})
  at = indices.start
  while at < indices.stop:
    stack = _stack_with(params, name, at)
    if stack is None:
      kind = common.remat(block, remat)
      carry = _as_tuple(kind(**fields(at), name=f"{name}.{at}")(*carry, *args))
      at += 1
      continue
    key, first, last = stack
    stop = min(last + 1, indices.stop)
    weights = params[key]
    if (at, stop) != (first, last + 1):
      part = slice(at - first, stop - first)
      weights = jax.tree.map(lambda w, part=part: w[part], weights)
    kind = common.remat(block, remat, in_loop=stop > at + 1)
    carry = _loop(kind(**fields(at), parent=None), weights, carry, args)
    at = stop
  return carry


def _stack_with(params: Params, name: str, index: int) -> tuple[str, int, int] | None:
  """Returns key, first and last index of the stack with a block, None for none."""
  for key in params:
    match = STACK.fullmatch(key)
    if match and match[1] == name and int(match[2]) <= index <= int(match[3]):
      return key, int(match[2]), int(match[3])
  return None


def _loop(block: nn.Module, weights: Params, carry: Carry, args: Carry) -> Carry:
  """Returns what a stack of blocks makes of values."""

  def body(carry: Carry, own: Params) -> tuple[Carry, None]:
    return _as_tuple(block.apply({"params": own}, *carry, *args)), None

  if len(jax.tree.leaves(weights)[0]) == 1:  # it may make a carry of another form
    return body(carry, jax.tree.map(lambda w: w[0], weights))[0]
  return jax.lax.scan(body, carry, weights)[0]


def _as_tuple(value: PyTree) -> Carry:
  return value if isinstance(value, tuple) else (value,)


def stacked(params: Params, lists: Sequence[str]) -> Params:
  """Returns parameters with the weights of alike neighbors in one array.

  Neighbors are alike whose weights have the same names, shapes and types.

  Args:
    params: nested dict of arrays or of their shapes; a sharding of a weight becomes that
      of the array, whose first axis is not sharded.
    lists: names of the lists of blocks, at any depth (see `Predictor.lists`).

  Example:
    >>> blocks = {f"blocks.{i}": {"bias": jnp.ones(2)} for i in range(3)}
    >>> jax.tree.map(jnp.shape, stacked(blocks | {"scale": jnp.ones(1)}, ("blocks",)))
    {'blocks.0-2': {'bias': (3, 2)}, 'scale': (1,)}
  """
  out: Params = {}
  found: dict[str, dict[int, Params]] = {}
  for key, value in params.items():
    name, _, index = key.rpartition(".")
    if name in lists and index.isdigit():
      found.setdefault(name, {})[int(index)] = value
    elif isinstance(value, Mapping):
      out[key] = stacked(value, lists)
    else:
      out[key] = value
  for name, blocks in found.items():
    for same in _runs(blocks):
      if len(same) == 1:
        out[f"{name}.{same[0]}"] = blocks[same[0]]
      else:
        whole = jax.tree.map(_stack, *(blocks[i] for i in same))
        out[f"{name}.{same[0]}-{same[-1]}"] = whole
  return out


def unstacked(params: Params) -> Params:
  """Returns parameters with the names of a folder: the inverse of `stacked`.

  Args:
    params: nested dict of arrays.

  Example:
    >>> unstacked({"blocks.3-4": {"bias": jnp.array([[1], [2]])}})["blocks.4"]
    {'bias': Array([2], dtype=int32)}
  """
  out: Params = {}
  for key, value in params.items():
    if match := STACK.fullmatch(key):
      first = int(match[2])
      for i in range(first, int(match[3]) + 1):
        own = jax.tree.map(lambda w, row=i - first: w[row], value)
        out[f"{match[1]}.{i}"] = own
    else:
      out[key] = unstacked(value) if isinstance(value, Mapping) else value
  return out


def _runs(blocks: Mapping[int, Params]) -> list[list[int]]:
  """Returns the indices of blocks in groups of alike neighbors."""
  runs: list[list[int]] = []
  kinds = {i: jax.tree.map(lambda x: (x.shape, x.dtype), b) for i, b in blocks.items()}
  for i in sorted(blocks):
    if runs and runs[-1][-1] == i - 1 and kinds[i - 1] == kinds[i]:
      runs[-1].append(i)
    else:
      runs.append([i])
  return runs


def _stack(*weights: Array) -> Array:
  """Returns weights, or their shapes, as one array with the sharding of each."""
  first = weights[0]
  place = (
    None if isinstance(first, jax.core.Tracer) else getattr(first, "sharding", None)
  )
  if isinstance(place, NamedSharding):
    place = NamedSharding(place.mesh, P(None, *place.spec))
  if isinstance(first, jax.ShapeDtypeStruct):
    shape = (len(weights), *first.shape)
    return jax.ShapeDtypeStruct(shape, first.dtype, sharding=place)
  return jnp.stack(weights) if place is None else _placed_stack(place)(*weights)


@functools.cache
def _placed_stack(place: jax.sharding.Sharding) -> Callable[..., Array]:
  """Returns jnp.stack of arrays on the devices of a sharding, compiled for it."""
  return jax.jit(lambda *weights: jnp.stack(weights), out_shardings=place)
