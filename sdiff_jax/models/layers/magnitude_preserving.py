"""Magnitude-preserving layers: unit variance in, unit variance out (EDM2).

Karras et al., arXiv:2312.02696, appendix B. A weight is stored as it was trained and
normalized where it is used, so that its gradient is orthogonal to it;
`normalize_weights` restores the norm of stored weights after an update ("forced" weight
normalization).
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.distributed import sharding
from sdiff_jax.kernels.cpu import materialized
from sdiff_jax.kernels.layout import gradient_in_row_major
from sdiff_jax.models.layers import common
from sdiff_jax.types import Array, Params, PyTree

EPS = 1e-4
# Added to a length in a denominator, whose derivative at a vector of zeros is NaN without
# it; without effect on vectors that are longer than EPS.
TINY = 1e-14
# Elements of weights that a GPU stacks; for larger ones, moving them once more costs more
# than the kernels that it saves.
MAX_STACKED = 1_000_000


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def length(x: Array, axes: tuple[int, ...]) -> Array:
  """Returns the root of the sum of squares over the axes, of size 1 in the result."""
  return jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))


@length.defjvp
def _length_jvp(
  axes: tuple[int, ...], primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
  (x,), (dx,) = primals, tangents
  found = length(x, axes)
  return found, jnp.sum(x * dx, axes, keepdims=True) / (found + TINY)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalize(x: Array, axes: tuple[int, ...]) -> Array:
  """Returns x / (rms(x) + eps) over the axes; statistics are in float32 or wider.

  Args:
    x: any array.
    axes: axes that the root mean square is taken over.
  """
  w = common.to_accumulation_dtype(x)
  return (w / (_rms(w, axes) + EPS)).astype(x.dtype)


@normalize.defjvp
def _normalize_jvp(
  axes: tuple[int, ...], primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
  """Returns x / d and (dx - x / (N r d) sum(x dx)) / d, with r = rms(x) and d = r + eps.

  In this form XLA makes fewer kernels of its transpose: x / (N r d) is inside of the sum,
  and nothing but r is stored for each vector.
  """
  (x,), (dx,) = primals, tangents
  w, dw = common.to_accumulation_dtype(x), common.to_accumulation_dtype(dx)
  r = _rms(w, axes)
  N = math.prod(w.shape[axis] for axis in axes)
  along = w / (N * (r + TINY) * (r + EPS)) * jnp.sum(w * dw, axes, keepdims=True)
  return normalize(x, axes), ((dw - along) / (r + EPS)).astype(x.dtype)


def _rms(w: Array, axes: tuple[int, ...]) -> Array:
  return length(w, axes) / math.prod(w.shape[axis] for axis in axes) ** 0.5


def pixel_norm(x: Array) -> Array:
  """Returns x normalized over its channels, the last axis."""
  return normalize(x, (-1,))


def silu(x: Array) -> Array:
  """Returns silu(x) / 0.596, of unit variance for a standard normal x (eq. 81)."""
  return jax.nn.silu(x) / 0.596


def add(a: Array, b: Array, t: float) -> Array:
  """Returns ((1-t) a + t b) / sqrt((1-t)^2 + t^2) (eq. 88)."""
  return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def concatenation_gains(a: int, b: int, t: float) -> tuple[float, float]:
  """Returns the factors of two arrays that are concatenated with weights 1 - t and t.

  With them (eq. 103) their contributions to a later sum do not depend on the numbers of
  their channels, a and b.
  """
  scale = math.sqrt(a + b) / math.hypot(1 - t, t)
  return scale * (1 - t) / a**0.5, scale * t / b**0.5


def concatenate(a: Array, b: Array, t: float) -> Array:
  """Returns a and b concatenated on the last axis with weights 1 - t and t (eq. 103)."""
  gains = concatenation_gains(a.shape[-1], b.shape[-1], t)
  return jnp.concatenate((a * gains[0], b * gains[1]), axis=-1)


def normalize_weight(w: Array) -> Array:
  """Returns w [..., out] whose rms over all inputs of each output is 1 (eq. 47)."""
  return normalize(w, tuple(range(w.ndim - 1)))


def normalize_weights(params: Params) -> Params:
  """Returns the parameters with all leaves named `weight` normalized.

  On GPUs small ones of one shape are normalized together, in fewer kernels.
  """
  return jax.lax.platform_dependent(
    params,
    cuda=functools.partial(_normalize_weights, largest=MAX_STACKED),
    default=functools.partial(_normalize_weights, largest=0),
  )


def _normalize_weights(params: Params, largest: int) -> Params:
  """Returns `normalize_weights`, weights of up to that many elements together."""
  paths, tree = jax.tree.flatten_with_path(params)
  leaves = [leaf for _, leaf in paths]
  groups: dict[tuple[int, ...], list[int]] = {}
  for i, (path, w) in enumerate(paths):
    if path[-1].key == "weight":
      groups.setdefault(w.shape if w.size <= largest else (i,), []).append(i)
  for group in groups.values():
    w = leaves[group[0]]
    if len(group) == 1:
      leaves[group[0]] = normalize_weight(w)
      continue
    # Behind the barrier they are stacked as they are, not computed again for it.
    parts = jax.lax.optimization_barrier([leaves[i] for i in group])
    w = normalize(jnp.stack(parts, -2), tuple(range(w.ndim - 1)))
    for at, i in enumerate(group):
      leaves[i] = w[..., at, :]
  return jax.tree.unflatten(tree, leaves)


class Weight(nn.Module):
  """A stored weight of this number of features, as it was trained."""

  features: int

  @nn.compact
  def __call__(self, *inputs: int) -> Array:
    return _stored(self, (*inputs, self.features))


def _stored(module: nn.Module, shape: tuple[int, ...]) -> Array:
  """Returns the weight of a module."""

  def init(key: Array, shape: tuple[int, ...]) -> Array:
    return normalize_weight(jax.random.normal(key, shape, jnp.float32))

  return module.param("weight", init, shape)


def of_unit_length(
  stored: Array, dtype: jnp.dtype, inputs: int = 1, gains: np.ndarray | float = 1.0
) -> Array:
  """Returns a weight whose columns have length 1.

  Args:
    stored: [..., features].
    dtype: of the result.
    inputs: number of first axes, which are those of a column.
    gains: factors of the result, which broadcast against it.
  """
  unit = normalize(stored, tuple(range(inputs)))
  unit *= jnp.asarray(gains / math.prod(stored.shape[:inputs]) ** 0.5, unit.dtype)
  return gradient_in_row_major(unit.astype(dtype))


def product(op: Callable[[PyTree, Array], Array], x: PyTree, weight: Array) -> Array:
  """Returns op(x, weight) as `sharding.rowwise` does, `materialized` for derivatives."""
  return materialized(sharding.rowwise(op, materialized(x), weight))


def linear(x: Array, stored: Array) -> Array:
  """Returns x W, [..., C] -> [..., *features], W of columns of length 1.

  Args:
    x: [..., C].
    stored: [C, *features].
  """
  w = of_unit_length(stored, x.dtype)
  return product(lambda x, w: jnp.tensordot(x, w, 1), x, w)


class Linear(nn.Module):
  """x W without bias, [..., C] -> [..., features].

  With `gains`, x is a tuple, and the result is that of its concatenation, each part times
  its gain, which is never made.
  """

  features: int
  dtype: jnp.dtype | None = None  # None: that of x

  @nn.compact
  def __call__(
    self, x: Array | tuple[Array, ...], gains: tuple[float, ...] = (1.0,)
  ) -> Array:
    parts = x if isinstance(x, tuple) else (x,)
    dtype = self.dtype or parts[0].dtype
    sizes = [part.shape[-1] for part in parts]
    stored = _stored(self, (sum(sizes), self.features))
    w = of_unit_length(stored, dtype, gains=np.repeat(gains, sizes)[:, None])

    def apply(parts: tuple[Array, ...], w: Array) -> Array:
      rows = jnp.split(w, np.cumsum(sizes)[:-1])
      return sum(part @ w for part, w in zip(parts, rows, strict=True))

    return product(apply, tuple(part.astype(dtype) for part in parts), w)


class Conv(nn.Module):
  """3 x 3 convolution without bias, [B, H, W, C] -> [B, H, W, features]."""

  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    stored = _stored(self, (3, 3, x.shape[-1], self.features))
    w = of_unit_length(stored, self.dtype, inputs=3)
    conv = functools.partial(
      jax.lax.conv_general_dilated,
      window_strides=(1, 1),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return product(conv, x.astype(self.dtype), w)


class Fourier(nn.Module):
  """sqrt(2) cos(t f + p) with fixed random f and p, [B] -> [B, features].

  Frequencies f and phases p are parameters, since a trained network needs those that it
  was trained with, but they have no gradient.
  """

  features: int

  @nn.compact
  def __call__(self, t: Array) -> Array:
    shape, tau = (self.features,), 2 * math.pi
    f = self.param("freqs", lambda k: tau * jax.random.normal(k, shape, jnp.float32))
    p = self.param("phases", lambda k: tau * jax.random.uniform(k, shape, jnp.float32))
    f, p = jax.lax.stop_gradient((f, p))
    return jnp.cos(t[:, None] * f[None] + p[None]) * 2**0.5
