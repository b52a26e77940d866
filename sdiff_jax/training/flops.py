"""Floating-point operations of a function, counted in its lowered program."""

from collections.abc import Callable

import jax

from sdiff_jax.kernels import attention
from sdiff_jax.types import PyTree


def count_flops(function: Callable[..., PyTree], *args: PyTree) -> float:
  """Returns the floating-point operations of function(*args), over all devices.

  They are counted in the program lowered for a CPU, because JAX gives no count for a
  GPU; if JAX_PLATFORMS excludes the CPU, in the compiled program. The body of a loop
  counts once; attention has none (see `attention.counted`).

  Args:
    function: function of arrays.
    args: trees of arrays, of which only shapes and types are used.

  Example:
    >>> import jax.numpy as jnp
    >>> count_flops(lambda x: x @ x, jnp.ones((8, 8)))
    1024.0
  """

  shapes = jax.eval_shape(lambda *args: args, *args)

  try:
    device = jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    device = None
  with jax.default_device(device), attention.counted():
    # A new function, which no cache knows with another kind of attention.
    lowered = jax.jit(lambda *args: function(*args)).lower(*shapes)
  cost: PyTree = lowered.cost_analysis() or lowered.compile().cost_analysis()
  return float((cost or {})["flops"])
