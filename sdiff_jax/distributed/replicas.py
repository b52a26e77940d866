"""Gradients that every replica of the parameters sums by itself, added once a step.

Replicas of the parameters lie along the mesh axes `data` and `window`. XLA adds the
gradient of a weight over them where it is computed, so once for every part of a batch
that is processed in parts. Here a loss is differentiated by copies of the parameters, one
per replica, which are the parameters' own memory; its gradients stay where they are, and
`total` adds them in a type that is chosen. What is sharded along `fsdp` stays sharded:
its weights are gathered, and its gradients scattered, in each part.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sdiff_jax.types import Array, Cond, Network, Params, PRNGKey, PyTree

AXES = ("data", "window")


class Copies(NamedTuple):
  """An array of which every replica has one: [replicas, ...], sharded along axis 0."""

  array: Array


def count() -> int:
  """Returns the number of replicas on the ambient mesh, 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  if any(types.get(axis) != AxisType.Auto for axis in AXES):
    return 1
  return math.prod(mesh.shape[axis] for axis in AXES)


def copies(tree: PyTree) -> PyTree:
  """Returns the tree with `Copies` of its arrays; nothing is sent."""
  return jax.tree.map(
    lambda x: Copies(_on_each(lambda x: x[None], P(), P(AXES))(x)), tree
  )


def total(tree: PyTree, dtype: jnp.dtype) -> PyTree:
  """Returns the sums of `Copies` over replicas, computed in a type.

  Args:
    tree: pytree of Copies.
    dtype: in which they are sent and added; the result has the type of the copies.
  """

  def add(x: Array) -> Array:
    return jax.lax.psum(x[0].astype(dtype), AXES).astype(x.dtype)

  return jax.tree.map(
    lambda x: _on_each(add, P(AXES), P())(x.array), tree, is_leaf=_is_copies
  )


def network(network: Network) -> Network:
  """Returns the network, whose functions take `Copies` of its parameters, too.

  Every replica then computes its own rows. Dropout masks are drawn by each of them.

  Example:
    >>> from sdiff_jax.models import mlp
    >>> plain = mlp.build(shape=(2,), cond={}, width=8, depth=1)
    >>> params, x = plain.init(jax.random.key(0)), jnp.ones((1, 2))
    >>> bool(jnp.all(network(plain).apply(params, x, jnp.ones(1), None) == 0))
    True
  """

  def apply(
    params: Params, x: Array, t: Array, cond: Cond, *, key: PRNGKey | None = None
  ) -> Array:
    def local(params: Params, rows: tuple, key: PRNGKey | None) -> Array:
      if key is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(AXES))
      return network.apply(params, *rows, key=key)

    def whole(params: Params, rows: tuple, key: PRNGKey | None) -> Array:
      return network.apply(params, *rows, key=key)

    return _by_rows(local, whole)(params, (x, t, cond), key)

  def logvar(params: Params, t: Array) -> Array:
    def run(params: Params, t: Array, key: None) -> Array:
      return network.logvar(params, t)

    return _by_rows(run, run)(params, t, None)

  return network._replace(apply=apply, logvar=logvar)


def _by_rows(local: Callable, whole: Callable) -> Callable:
  """Returns `local` on each replica's copy and rows, `whole` without copies."""

  def call(params: Params, rows: PyTree, key: PRNGKey | None) -> Array:
    leaves = jax.tree.leaves(params, is_leaf=_is_copies)
    if not any(map(_is_copies, leaves)):
      return whole(params, rows, key)
    if jax.tree.leaves(rows)[0].shape[0] % count():
      return whole(_map(lambda x: x[0], params), rows, key)

    def run(params: Params, rows: PyTree, key: PRNGKey | None) -> Array:
      return local(_map(lambda x: x[0], params), rows, key)

    return _on_each(run, (P(AXES), P(AXES), P()), P(AXES))(params, rows, key)

  return call


def _map(function: Callable, tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: function(x.array), tree, is_leaf=_is_copies)


def _is_copies(x: PyTree) -> bool:
  return isinstance(x, Copies)


def _on_each(function: Callable, in_specs: PyTree, out_specs: PyTree) -> Callable:
  return jax.shard_map(
    function,
    axis_names=set(AXES),
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=False,
  )
