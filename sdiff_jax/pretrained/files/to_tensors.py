"""Trees of parameters as tensors by name, to write them to files."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sdiff_jax.types import Params, PyTree

SEPARATOR = "/"  # of the keys in a name of our own layout


def from_params(
  params: Params,
  name: Callable[[tuple[str, ...]], str],
  shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, np.ndarray]:
  """Returns a tree of parameters as tensors in PyTorch's layout, by name.

  This is the inverse of `state_dict.match_params`: kernels [..., in, out] become [out, in, ...].

  Args:
    params: nested dict of arrays.
    name: (keys of a leaf of `params`) -> name of its tensor.
    shapes: of tensors by name, where a matrix is a 1x1 convolution; None for none.

  Raises:
    ValueError: a parameter has another number of elements than its shape says.

  Example:
    >>> tensors = from_params({"a": {"kernel": np.zeros((2, 3))}}, ".".join)
    >>> {name: x.shape for name, x in tensors.items()}
    {'a.kernel': (3, 2)}
  """
  tensors = {}
  for where, leaf in jax.tree.leaves_with_path(params):
    keys = tuple(k.key for k in where)
    x, at = np.asarray(leaf), name(keys)
    if keys[-1] != "embedding" and x.ndim > 1:
      x = x.transpose(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2))
    shape = (shapes or {}).get(at, x.shape)
    if np.prod(shape) != x.size:
      raise ValueError(f"shapes: {at} is {x.shape}, which is not {shape}")
    tensors[at] = x.reshape(shape)
  return tensors


def flat(params: Params) -> dict[str, Any]:
  """Returns the leaves of a tree as they are, by their keys, "net/out/kernel".

  Args:
    params: nested dict of arrays or of their shapes; None is no leaf.

  Example:
    >>> flat({"net": {"out": {"bias": 1}}, "vae": None})
    {'net/out/bias': 1}
  """
  return {
    SEPARATOR.join(str(k.key) for k in where): leaf
    for where, leaf in jax.tree.leaves_with_path(params)
  }


def unflat(tensors: Mapping[str, Any], like: PyTree) -> Params:
  """Returns the tree of leaves by their keys: the inverse of `flat`.

  Args:
    tensors: by name.
    like: a tree with the same keys.

  Example:
    >>> unflat({"net/bias": 2}, {"net": {"bias": 1}})
    {'net': {'bias': 2}}
  """
  leaves = [tensors[name] for name in flat(like)]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)
