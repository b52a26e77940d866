"""The order of an array's axes in memory, where the compiler's choice costs copies.

On GPUs, XLA gives a convolution the order of axes that cuDNN wants, and carries it through
all operations without products that follow: moments, parameters and averages were then
transposed in float32 in every step, and copied to where they are stored. A gradient in
row-major order is transposed once. On a TPU the same constraint adds traffic, so there
XLA chooses.
"""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from sdiff_jax.types import Array, PyTree


def row_major(tree: PyTree) -> PyTree:
  """Returns the arrays of a tree; on GPUs their last axis is contiguous in memory.

  Values, derivatives and shardings are those of the arrays.

  Example:
    >>> import jax.numpy as jnp
    >>> row_major({"w": jnp.ones((2, 3))})["w"].shape
    (2, 3)
  """

  def on_gpu(tree: PyTree) -> PyTree:
    return jax.tree.map(_constrained, tree)

  return jax.lax.platform_dependent(tree, cuda=on_gpu, default=lambda tree: tree)


def _constrained(x: Array) -> Array:
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@jax.custom_jvp
def gradient_in_row_major(x: Array) -> Array:
  """Returns x, whose tangent and gradient are `row_major`.

  Example:
    >>> jax.grad(lambda x: gradient_in_row_major(x) ** 2)(3.0)
    Array(6., dtype=float32, weak_type=True)
  """
  return x


@gradient_in_row_major.defjvp
def _gradient_in_row_major_jvp(
  primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
  return primals[0], row_major(tangents[0])
