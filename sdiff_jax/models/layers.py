"""Layers that the networks share."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.interfaces import Array, Cond
from sdiff_jax.kernels import softmax

EPS = 1e-6


def wide(x: Array) -> Array:
  """Returns x in the type that sums and statistics of it need."""
  return x.astype(softmax.wide(x.dtype))


def positional(t: Array, width: int) -> Array:
  """Returns cos and sin of t at frequencies 10000^(-i / (width/2 - 1)), [B, width].

  The highest frequency is 1, so the embedding of t in [0, pi/2] is slow in t; a fast
  one (Fourier features of scale 16) makes dF/dt explode (arXiv:2410.11081, 4.1).
  """
  frequencies = (10_000.0 ** -np.linspace(0, 1, width // 2)).astype(t.dtype)
  angles = t[:, None] * frequencies[None, :]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rms_norm(x: Array) -> Array:
  """Returns x / sqrt(mean(x^2) + eps) over the last axis (pixel norm, PGGAN).

  The square root of a sum that cannot be 0 keeps its tangent finite at x = 0.
  """
  w = wide(x)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(w), -1, keepdims=True) + EPS)
  return (w * scale).astype(x.dtype)


def layer_norm(x: Array) -> Array:
  """Returns (x - mean) / sqrt(var + eps) over the last axis, statistics in float32."""
  w = wide(x)
  return rms_norm(w - jnp.mean(w, -1, keepdims=True)).astype(x.dtype)


class AdaptiveDoubleNorm(nn.Module):
  """y = norm(x) * pnorm(s(emb)) + pnorm(b(emb)) (arXiv:2410.11081, section 4.1).

  norm is without parameters, pnorm the pixel norm, s and b are affine in the
  embedding. x is [B, ..., C], emb [B, E].
  """

  dtype: jnp.dtype
  norm: Callable[[Array], Array] = layer_norm

  @nn.compact
  def __call__(self, x: Array, emb: Array) -> Array:
    # s must not start at 0: pnorm's derivative there is 1 / sqrt(eps).
    s = nn.Dense(x.shape[-1], dtype=self.dtype, name="scale")(emb)
    b = nn.Dense(x.shape[-1], dtype=self.dtype, name="shift")(emb)
    ones = (1,) * (x.ndim - 2)
    s, b = (rms_norm(a).reshape(a.shape[0], *ones, a.shape[-1]) for a in (s, b))
    return self.norm(x) * s + b


def class_weights(label: Array, classes: int, dtype: jnp.dtype) -> Array:
  """Returns classes^0.5 times the weights of the classes, [B, classes].

  Args:
    label: a class, -1 for none, [B], or weights of the classes, [B, classes].
    classes: their number.
    dtype: of the result, for classes.
  """
  if jnp.issubdtype(label.dtype, jnp.integer):
    label = jax.nn.one_hot(label, classes, dtype=dtype)
  return label * classes**0.5


def from_zero(width: int, name: str) -> nn.Dense:
  """Returns a linear layer that starts at 0: what it is added to starts without it."""
  zeros = nn.initializers.zeros
  return nn.Dense(width, use_bias=False, kernel_init=zeros, name=name)


class Embedding(nn.Module):
  """Embeds t, and label, guidance scale and observation, if any, as [B, width].

  t enters as it is, c_noise(t) = t. A label -1 adds nothing. The guidance scale goes
  through the positional embedding and a linear layer that starts at 0, so a student
  with it starts as its teacher without it.
  """

  width: int
  classes: int
  guidance: bool
  dtype: jnp.dtype
  observation: bool = False

  @nn.compact
  def __call__(self, t: Array, cond: Cond) -> Array:
    emb = nn.Dense(self.width, name="time")(positional(t, self.width))
    if self.classes:
      labels = class_weights(cond["label"], self.classes, emb.dtype)
      emb += nn.Dense(self.width, use_bias=False, name="label")(labels)
    if self.guidance:
      scale = positional(cond["guidance"], self.width)
      emb += from_zero(self.width, "guidance")(scale)
    if self.observation:
      emb += nn.Dense(self.width, name="observation")(cond["observation"])
    emb = nn.Dense(self.width, name="out")(nn.silu(emb))
    return nn.silu(emb).astype(self.dtype)


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
    # Features of unit norm: an optimiser's step then moves w by some 10 rates, not 100.
    x *= (2 / self.features) ** 0.5
    w = nn.Dense(1, kernel_init=nn.initializers.zeros)(x)
    return w[:, 0]
