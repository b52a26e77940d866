"""Floating-point operations of a training step, counted in its lowered program."""

from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable, *args: Any) -> float:
  """Returns the floating-point operations of function(*args), over all devices.

  Counted in the program lowered for a CPU, as JAX does not tell for a GPU; where
  JAX_PLATFORMS leaves out the CPU, in the compiled one. A loop's body counts once.

  Args:
    function: of arrays.
    args: trees of arrays, of which only shapes and types are used.
  """

  def shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)

  try:
    device = jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    device = None
  with jax.default_device(device):
    lowered = jax.jit(function).lower(*jax.tree.map(shape, args))
  cost = lowered.cost_analysis() or lowered.compile().cost_analysis()
  return float(cost["flops"])
