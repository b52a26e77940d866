"""Parameters of published networks (PyTorch's names and layouts) as ours."""

from collections.abc import Callable

import jax
import numpy as np

from sdiff_jax.interfaces import Params, UserError


def restore(
  tensors: dict[str, np.ndarray], like: Params, name_of: Callable[[str], str]
) -> Params:
  """Returns tensors as parameters: names and layouts change, no value does.

  Args:
    tensors: name -> array; convolutions are [out, in, H, W], linear layers [out, in].
    like: abstract parameters of the network they are for; convolutions are
      [H, W, in, out], or [in, out] if 1 x 1, linear layers [in, out].
    name_of: "/layer/parameter" of ours -> name in tensors.

  Raises:
    UserError: missing, left over or wrongly shaped tensors; the message lists them.
  """
  wrong, left = [], set(tensors)

  def of(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray | None:
    name = name_of("".join(f"/{k.key}" for k in path))
    left.discard(name)
    if name not in tensors:
      wrong.append(f"{name} is missing")
      return None
    array = np.asarray(tensors[name], leaf.dtype)
    if array.shape[2:] == (1, 1):
      array = array[..., 0, 0]
    array = array.transpose({2: (1, 0), 4: (2, 3, 1, 0)}.get(array.ndim))
    if array.shape != leaf.shape:
      wrong.append(f"{name} is {array.shape}, the network's {leaf.shape}")
    return array

  params = jax.tree.map_with_path(of, like)
  wrong += [f"{name} is left over" for name in sorted(left)]
  if wrong:
    raise UserError(f"parameters of another network: {'; '.join(wrong)}")
  return params
