"""Compares the arrays that a checkpoint holds with those that a network needs."""

import jax

from sdiff_jax.types import PyTree


def difference(
  stored: PyTree, needed: PyTree, only_needed: tuple[str, ...] = ()
) -> str:
  """Returns what of the stored arrays does not fit, "" if all of them do.

  Args:
    stored: arrays, or objects with a `shape`, nested in dicts and lists.
    needed: the same of the network; nodes may be of other types, such as named tuples.
    only_needed: names of subtrees in which the checkpoint may hold more.

  Example:
    >>> import numpy as np
    >>> difference({"a": {"b": np.zeros(3)}}, {"a": {"b": np.zeros((2, 4))}})
    'a.b has shape [3], and the network needs [2, 4]'
  """
  there, here = _shapes(stored), _shapes(needed)
  for name, shape in here.items():
    if name not in there:
      return f"{name}, which the network needs, is missing"
    if there[name] != shape:
      return f"{name} has shape {[*there[name]]}, and the network needs {[*shape]}"
  for name in there.keys() - here.keys():
    if not name.startswith(only_needed or "\0"):
      return f"{name} is no array of the network"
  return ""


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  """Returns name -> shape of the arrays of a tree."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    ".".join(map(_key, path)): tuple(leaf.shape)
    for path, leaf in leaves
    if getattr(leaf, "shape", None) is not None
  }


def _key(entry: object) -> str:
  """Returns the name of an entry of a path in a tree."""
  for attribute in ("key", "name", "idx"):
    if hasattr(entry, attribute):
      return str(getattr(entry, attribute))
  return str(entry)
