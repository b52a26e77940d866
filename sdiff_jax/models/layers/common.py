"""Layers that the networks share."""

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.distributed import sharding
from sdiff_jax.fields import Length, Range
from sdiff_jax.kernels import _online_softmax
from sdiff_jax.types import Array

EPS = 1e-6
FOURIER_SCALE = 16  # standard deviation of the frequencies, as in EDM


def _no_gathered_weights(primitive: Any, *_: Any, **params: Any) -> bool:
  """Returns False for weights of other devices, and for what only moves elements.

  `checkpoint_policies.save_anything_except_these_names` would keep the operand of the
  operation that names the weight.
  """
  return primitive.name not in ("all_gather", "reshape", "transpose", "split")


# Policies of rematerialization: what a block stores for its backward pass, by the field
# `remat`: everything, all but gathered weights, results of matrix products and
# convolutions, or its inputs alone.
KEEPS = {
  "": None,
  "weights": _no_gathered_weights,
  "dots": jax.checkpoint_policies.dots_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


# Fields that networks share.
Remat = Literal["", "weights", "dots", "full"]
Process = Literal["trigflow", "edm"]
TimeEmbedding = Literal["positional", "fourier"]
Norm = Literal["double", "single"]
Multipliers = Annotated[tuple[int, ...], Range(1, 64), Length(1, 8)]
Heights = Annotated[tuple[int, ...], Range(1), Length(0, 16)]


def to_accumulation_dtype(x: Array) -> Array:
  """Returns x in the dtype in which sums and statistics of it are computed."""
  return x.astype(_online_softmax.accumulation_dtype(x.dtype))


def remat(
  block: type[nn.Module], how: Remat, *, in_loop: bool = False
) -> type[nn.Module]:
  """Returns the block with rematerialization in its backward pass.

  Args:
    block: a Linen module.
    how: key of KEEPS; results do not depend on it.
    in_loop: whether the block is the body of a scan, for which XLA cannot undo
      rematerialization.

  """
  if not how:
    return block
  return nn.remat(block, policy=KEEPS[how], prevent_cse=not in_loop)


def _rowwise(op: Callable[..., Array]) -> Callable[..., Array]:
  def call(x: Array, weight: Array, *args: Any, **options: Any) -> Array:
    return sharding.rowwise(lambda x, w: op(x, w, *args, **options), x, weight)

  return call


# Linen's layers, whose weights may be sharded over devices.
Dense = functools.partial(nn.Dense, dot_general=_rowwise(jax.lax.dot_general))
DenseGeneral = functools.partial(
  nn.DenseGeneral, dot_general=_rowwise(jax.lax.dot_general)
)
Conv = functools.partial(
  nn.Conv, conv_general_dilated=_rowwise(jax.lax.conv_general_dilated)
)


def positional(t: Array, width: int) -> Array:
  """Returns cos and sin of t at frequencies 10000^(-i / (width/2 - 1)), [B, width].

  The highest frequency is 1, so the embedding of t in [0, pi/2] is slow in t; a fast
  one (Fourier features of scale 16) makes dF/dt explode (arXiv:2410.11081, 4.1).
  """
  return _waves(t, 10_000.0 ** -np.linspace(0, 1, width // 2))


def fourier(t: Array, width: int) -> Array:
  """Returns cos and sin of 2 pi 16 n t for fixed normal n, [B] -> [B, width].

  They are the features of Score SDE and EDM; their derivative is about 100 times that of
  `positional`.
  """
  normal = np.random.default_rng(0).standard_normal(width // 2)
  return _waves(t, 2 * np.pi * FOURIER_SCALE * normal)


def _waves(t: Array, frequencies: np.ndarray) -> Array:
  """Returns cos and sin of t [B] at frequencies [W], [B, 2W]."""
  angles = t[:, None] * frequencies.astype(t.dtype)[None, :]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rms_norm(x: Array, eps: float = EPS) -> Array:
  """Returns x / sqrt(mean(x^2) + eps) over the last axis, the pixel norm of PGGAN.

  eps is inside the square root, so that the tangent is finite at x = 0.
  """
  w = to_accumulation_dtype(x)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(w), -1, keepdims=True) + eps)
  return (w * scale).astype(x.dtype)


def layer_norm(x: Array, eps: float = EPS) -> Array:
  """Returns (x - mean) / sqrt(var + eps) over the last axis, statistics in float32."""
  w = to_accumulation_dtype(x)
  return rms_norm(w - jnp.mean(w, -1, keepdims=True), eps).astype(x.dtype)


class AdaptiveDoubleNorm(nn.Module):
  """y = norm(x) * pnorm(s(emb)) + pnorm(b(emb)) (arXiv:2410.11081, section 4.1).

  norm has no parameters, pnorm is the pixel norm, s and b are affine in the embedding;
  x is [B, ..., C], emb is [B, E].
  """

  dtype: jnp.dtype
  norm: Callable[[Array], Array] = layer_norm

  @nn.compact
  def __call__(self, x: Array, emb: Array) -> Array:
    # s must not start at 0, where the derivative of pnorm is 1 / sqrt(eps).
    s, b = (rms_norm(a) for a in _scale_and_shift(x, emb, self.dtype))
    return self.norm(x) * _beside(s, x) + _beside(b, x)


class AdaptiveNorm(nn.Module):
  """y = norm(x) (1 + s(emb)) + b(emb): without the second norm, as AdaGN.

  See AdaptiveDoubleNorm; the parameters are the same.
  """

  dtype: jnp.dtype
  norm: Callable[[Array], Array] = layer_norm

  @nn.compact
  def __call__(self, x: Array, emb: Array) -> Array:
    s, b = _scale_and_shift(x, emb, self.dtype)
    return self.norm(x) * (1 + _beside(s, x)) + _beside(b, x)


def _scale_and_shift(x: Array, emb: Array, dtype: jnp.dtype) -> list[Array]:
  """Returns s and b of an adaptive norm, affine in the embedding, [B, C] each."""
  names = ("scale", "shift")
  return [Dense(x.shape[-1], dtype=dtype, name=name)(emb) for name in names]


def _beside(a: Array, x: Array) -> Array:
  """Returns a [B, C] as [B, 1, ..., C], which broadcasts against x [B, ..., C]."""
  return a.reshape(a.shape[0], *(1,) * (x.ndim - 2), a.shape[-1])


class LogVar(nn.Module):
  """w_phi(t): fixed random Fourier features of t and one linear layer, [B] -> [B]."""

  features: int = 128

  @nn.compact
  def __call__(self, t: Array) -> Array:
    rng = np.random.default_rng(0)
    frequencies = 2 * np.pi * rng.standard_normal(self.features, np.float32)
    phases = 2 * np.pi * rng.random(self.features, np.float32)
    frequencies, phases = frequencies.astype(t.dtype), phases.astype(t.dtype)
    x = jnp.cos(t[:, None] * frequencies[None] + phases[None])
    # Features of unit norm: an optimizer step then moves w by about 10 learning rates
    # instead of 100.
    x *= (2 / self.features) ** 0.5
    w = Dense(1, kernel_init=nn.initializers.zeros)(x)
    return w[:, 0]
