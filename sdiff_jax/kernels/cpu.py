"""What makes programs fast on CPUs, where XLA's choices cost most of a training step.

XLA's CPU compiler fuses element-wise operations into every operation that reads them. To
transpose an operand of a product, as the gradient of a weight does, it computes a chain of
twenty operations again, in the order of the result, along which memory is read with
strides. It removes optimization barriers before it fuses, but keeps calls that must not be
inlined: `materialized` is such a call of the identity.

By default it gives convolutions to YNNPACK, which is as fast as Eigen for images with a
filter, and takes three times as long for the gradient of the filter.
"""

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from sdiff_jax.types import Array, PyTree

# Of the operations that XLA may give to YNNPACK, products alone: no convolutions.
_TRAINING = {
  "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}


def training_options(device: jax.Device) -> dict[str, str]:
  """Returns the compiler options of a training step for a device: {} if it is no CPU.

  Example:
    >>> options = training_options(jax.devices("cpu")[0])
    >>> step = jax.jit(lambda x: x + 1, compiler_options=options)
  """
  return _TRAINING if device.platform == "cpu" else {}


def materialized(tree: PyTree) -> PyTree:
  """Returns the arrays of a tree; on CPUs, derivatives find them in memory.

  Values and derivatives are those of the arrays. Where a CPU differentiates, arrays,
  tangents and gradients are stored; programs that do not differentiate are as without it.

  Example:
    >>> jax.grad(lambda x: materialized(x) ** 2)(3.0)
    Array(6., dtype=float32, weak_type=True)
  """
  return jax.tree.map(_identity, tree)


@jax.custom_jvp
def _identity(x: Array) -> Array:
  return x


@_identity.defjvp
def _identity_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
  return _stored.bind(primals[0]), _stored.bind(tangents[0])


def _call(x: Array) -> Array:
  with set_xla_metadata(inlineable="false"):
    return jax.jit(lambda x: x)(x)


_stored = core.Primitive("stored")
_stored.def_impl(lambda x: x)
_stored.def_abstract_eval(lambda x: x)
mlir.register_lowering(_stored, lambda context, x: [x])
mlir.register_lowering(_stored, mlir.lower_fun(_call, False), platform="cpu")
ad.deflinear2(_stored, lambda gradient, x: [_stored.bind(gradient)])
batching.defvectorized(_stored)
