"""Consistency training along any tangent: options, normalizers and the loss."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sdiff_jax import fields
from sdiff_jax.diffusion import guidance as cfg
from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.fields import Index, LogMean, NotNegative, Positive
from sdiff_jax.losses import _velocity, _weighting
from sdiff_jax.losses._velocity import GuidanceRange, VelocityFn
from sdiff_jax.types import (
  Array,
  Batch,
  Cond,
  LossFn,
  Metrics,
  NetFn,
  Network,
  Params,
  PRNGKey,
)


class Times(NamedTuple):
  """The times of a batch.

  Attributes:
    t: TrigFlow times at which the network is trained, [B].
    s: times that belong to them, such as the end of a segment, [B].
    u: the factor of the tangent is cos(u), [B].
  """

  t: Array
  s: Array
  u: Array


# (key, B) -> Times.
TimeSampler = Callable[[PRNGKey, int], Times]


class TangentFn(Protocol):
  """Returns F and the tangent g = cos(u) df/dt, [B, ...] each; see `scm.tangent`."""

  def __call__(
    self,
    net: NetFn,
    xt: Array,
    t: Array,
    v: Array,
    cond: Cond,
    *,
    sigma_d: float,
    r: Array | float,
    s: Array,
  ) -> tuple[Array, Array]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyOptions:
  """The options that all losses with a tangent share.

  Attributes:
    p_mean: mean of ln(sigma_d tan t) in training.
    p_std: standard deviation of ln(sigma_d tan t) in training.
    tangent_normalizer: "rms" or "l2" for g / (|g| + c), "clip" for df/dt clipped to
      [-1, 1], "none".
    c: constant of the normalization.
    warmup_steps: steps over which the warm-up r rises from 0 to 1.
    adaptive_weight: whether w_phi(t) is learned; otherwise w = 0.
    guidance: (low, high) scales of classifier-free guidance to distill, () for none.

  Raises:
    ValueError: an option is not what it may be.

  Example:
    >>> ConsistencyOptions(p_mean=-0.8, p_std=1.6).tangent_normalizer
    'rms'
  """

  p_mean: LogMean = -1.0
  p_std: Positive = 1.4
  tangent_normalizer: Literal["rms", "l2", "clip", "none"] = "rms"
  c: NotNegative = 0.1
  warmup_steps: Index = 10_000
  adaptive_weight: bool = True
  guidance: GuidanceRange = ()

  def __post_init__(self) -> None:
    fields.check_instance(self)
    _velocity.check_guidance(self.guidance)
    object.__setattr__(self, "guidance", tuple(self.guidance))


def tangent_norm(g: Array, *, rms: bool) -> Array:
  """Returns |g| of each sample, [B, 1, ...]: L2, or root mean square over D.

  Args:
    g: tangents, [B, ...].
    rms: whether the norm is the root mean square over D instead of L2.

  Example:
    >>> float(tangent_norm(jnp.full((1, 4), 3.0), rms=True)[0, 0])
    3.0
  """
  axes = tuple(range(1, g.ndim))
  reduce = jnp.mean if rms else jnp.sum
  return jnp.sqrt(reduce(jnp.square(g), axes, keepdims=True))


def _rms(g: Array, u: Array, c: float) -> Array:
  return g / (tangent_norm(g, rms=True) + c)


def _l2(g: Array, u: Array, c: float) -> Array:
  return g / (tangent_norm(g, rms=False) + c)


def _clip(g: Array, u: Array, c: float) -> Array:
  # clip(df/dt, -1, 1) cos(u), with g = cos(u) df/dt
  bound = trigflow.expand(jnp.cos(u), g)
  return jnp.clip(g, -bound, bound)


def _none(g: Array, u: Array, c: float) -> Array:
  return g


TANGENT_NORMALIZERS: dict[str, Callable[[Array, Array, float], Array]] = {
  "rms": _rms,
  "l2": _l2,
  "clip": _clip,
  "none": _none,
}


DEFAULT_OPTIONS = ConsistencyOptions()


def normalize_tangent(
  g: Array, u: Array, *, normalizer: str = "rms", c: float = 0.1
) -> Array:
  """Returns the tangent with a bounded size (arXiv:2410.11081, section 4.2).

  Args:
    g: tangent cos(u) df/dt, [B, ...].
    u: angle of its factor, [B].
    normalizer: key of `TANGENT_NORMALIZERS`, see `ConsistencyOptions`.
    c: constant of the normalization.

  Returns:
    The normalized tangent, [B, ...].

  Example:
    >>> normalize_tangent(jnp.full((1, 4), 3.0), jnp.zeros(1), c=0.0)
    Array([[1., 1., 1., 1.]], dtype=float32)
  """
  return TANGENT_NORMALIZERS[normalizer](g, u, c)


def tangent_loss(
  *,
  network: Network,
  sigma_d: float,
  time_sampler: TimeSampler,
  velocity: VelocityFn,
  tangent: TangentFn,
  options: ConsistencyOptions,
) -> LossFn:
  """Returns E[e^w |F - F^- - g|^2 / D - w] (arXiv:2410.11081, eq. 8).

  F^- is F without gradients, and g the normalized tangent.

  Args:
    network: the network to train.
    sigma_d: standard deviation of the data.
    time_sampler: draws the times of a batch.
    velocity: dx_t/dt at the states of a batch.
    tangent: of the consistency function along the velocity.
    options: normalization, warm-up, weight and guidance.

  Returns:
    A LossFn that logs "mse" and "tangent_norm", the root mean square of g before its
    normalization.
  """

  def loss(
    params: Params, batch: Batch, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, Metrics]:
    x0 = batch["x0"]
    key_t, key_z, key_v, key_dropout = jax.random.split(key, 4)
    t, s, u = time_sampler(key_t, x0.shape[0])
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    xt = trigflow.perturb(x0, z, t)
    cond = cfg.sample_scale(key_v, t, batch["cond"], options.guidance)
    v = velocity(frozen, x0, z, xt, t, cond)
    net = functools.partial(network.apply, params, key=key_dropout)
    r = time_grids.warmup(step, options.warmup_steps)
    F, g = tangent(net, xt, t, v, cond, sigma_d=sigma_d, r=r, s=s)
    target = normalize_tangent(g, u, normalizer=options.tangent_normalizer, c=options.c)
    error = F - jax.lax.stop_gradient(F) - target
    w = network.logvar(params, t) if options.adaptive_weight else None
    weighted, mse = _weighting.adaptive(error, w)
    size = jnp.mean(tangent_norm(g, rms=True))
    return jnp.mean(weighted), {"mse": jnp.mean(mse), "tangent_norm": size}

  return loss
