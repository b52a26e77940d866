"""Consistency models before sCM: adjacent noise levels, EDM's f, pseudo-Huber metric.

Consistency distillation and training of arXiv:2303.01469 with the improvements of
arXiv:2310.14189 (iCT): no average in the target, a pseudo-Huber metric, weights
1 / (sigma_{i+1} - sigma_i), log-normal levels, and a grid whose size doubles.
"""

import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import guidance as cfg
from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.fields import Count, LogMean, NotNegative, Positive, Range
from sdiff_jax.losses import _velocity
from sdiff_jax.losses._velocity import GuidanceRange, TeacherFn, Velocity
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


def consistency(
  net: NetFn, x: Array, sigma: Array, cond: Cond, *, sigma_d: float
) -> Array:
  """Returns f(x, sigma) = c_skip x + c_out (-F), identity at sigma = 0.002.

  c_skip = sigma_d^2 / ((sigma - eps)^2 + sigma_d^2) and
  c_out = sigma_d (sigma - eps) / sqrt(sigma^2 + sigma_d^2), eps = 0.002
  (arXiv:2303.01469, appendix C). With eps = 0 it is TrigFlow's f.

  Args:
    net: TrigFlow network; its inputs are x / sqrt(sigma^2 + sigma_d^2), which is
      x_t / sigma_d, and the time arctan(sigma / sigma_d).
    x: x0 + sigma eps, [B, ...].
    sigma: noise levels, [B].
    cond: conditions of the network.
    sigma_d: standard deviation of the data.

  Returns:
    f, [B, ...].

  Example:
    >>> x, sigma = jnp.ones((2, 3)), jnp.full(2, time_grids.SIGMA_MIN)
    >>> bool((consistency(lambda x, t, cond: x, x, sigma, None, sigma_d=0.5) == x).all())
    True
  """
  above = sigma - time_grids.SIGMA_MIN
  length = jnp.sqrt(sigma**2 + sigma_d**2)
  skip = sigma_d**2 / (above**2 + sigma_d**2)
  F = net(x / trigflow.expand(length, x), jnp.arctan(sigma / sigma_d), cond)
  return trigflow.expand(skip, x) * x - trigflow.expand(sigma_d * above / length, x) * F


def adjacent_times(
  key: PRNGKey, batch: int, n: Array, *, p_mean: float, p_std: float
) -> tuple[Array, Array]:
  """Draws pairs of adjacent levels of EDM's grid of n + 1 levels.

  The probability of a pair is the mass of ln(sigma) ~ N(p_mean, p_std^2), truncated to
  [0.002, 80], between its levels (arXiv:2310.14189, section 3.5).

  Args:
    key: random key.
    batch: number of pairs B.
    n: number of intervals of the grid, int32 scalar.
    p_mean: mean of ln(sigma).
    p_std: standard deviation of ln(sigma).

  Returns:
    The higher and the lower level of each pair, float32 [B] each.

  Example:
    >>> high, low = adjacent_times(
    ...   jax.random.key(0), 4, jnp.int32(10), p_mean=-1.1, p_std=2.0
    ... )
    >>> bool((high > low).all())
    True
  """
  low, high = (s ** (1 / 7) for s in (time_grids.SIGMA_MIN, time_grids.SIGMA_MAX))
  lower, upper = (
    (math.log(s) - p_mean) / p_std for s in (time_grids.SIGMA_MIN, time_grids.SIGMA_MAX)
  )
  draws = jax.random.truncated_normal(key, lower, upper, (batch,), jnp.float32)
  tau = p_mean + p_std * draws
  ramp = (jnp.exp(tau / 7) - low) / (high - low)
  n = n.astype(jnp.float32)
  i = jnp.clip(jnp.floor(ramp * n), 0, n - 1)
  below, above = ((low + j / n * (high - low)) ** 7 for j in (i, i + 1))
  return above, below


@registry.register(
  "losses",
  "consistency",
  title=lambda fields: "CD" if fields["velocity"] == "teacher" else "CT",
  family="consistency",
  needs_teacher=lambda fields: fields["velocity"] == "teacher",
)
def build(
  *,
  network: Network,
  sigma_d: Positive,
  teacher: TeacherFn | None = None,
  velocity: Velocity = "data",
  levels: Annotated[tuple[int, int], Range(1, 1_000_000)] = (10, 1280),
  double_every: Count = 50_000,
  p_mean: LogMean = -1.1,
  p_std: Positive = 2.0,
  c: NotNegative = 0.00054,
  guidance: GuidanceRange = (),
) -> LossFn:
  """Returns E[(sqrt(|f(x, sigma) - f^-(y, sigma')|^2 + C^2) - C) / (sigma - sigma')].

  y is one step of Heun's method from x to the next lower level sigma' along the
  velocity. Along the velocity of the data it is x0 + sigma' eps with the noise eps of x.
  C = c sqrt(D).

  Args:
    network: the network to train.
    sigma_d: standard deviation of the data.
    teacher: the teacher network; only velocity="teacher" uses it.
    velocity: "data" trains on data (CT), "teacher" distills a teacher (CD).
    levels: number of intervals of the grid at the start and at the end of training.
    double_every: number of training steps after which the grid size doubles.
    p_mean: mean of ln(sigma) in training.
    p_std: standard deviation of ln(sigma) in training.
    c: constant of the metric, for one dimension.
    guidance: (low, high) scales of classifier-free guidance to distill, () for none.

  Returns:
    A LossFn that logs "mse" and "levels".

  Raises:
    ValueError: the velocity is unknown, there is no teacher to distill, guidance is
      requested without one, or the levels decrease.

  Example:
    >>> import jax
    >>> network = Network(
    ...   init=lambda key: {"net": jnp.float32(0.5), "logvar": jnp.float32(0.0)},
    ...   apply=lambda params, x, t, cond, *, key=None: params["net"] * x,
    ...   logvar=lambda params, t: params["logvar"] * t,
    ... )
    >>> loss = build(network=network, sigma_d=0.5)
    >>> batch = {"x0": jnp.ones((4, 2)), "cond": None}
    >>> key, step = jax.random.key(0), jnp.int32(0)
    >>> value, metrics = loss(network.init(key), batch, key, step, None)
    >>> value.shape, sorted(metrics)
    ((), ['levels', 'mse'])
  """
  first, last = levels
  if first > last:
    raise ValueError(f"levels={tuple(levels)}: must not decrease")
  _velocity.check_guidance(guidance)
  guidance = tuple(guidance)
  velocity_of = _velocity.build(velocity, teacher, sigma_d=sigma_d, guidance=guidance)

  def loss(
    params: Params, batch: Batch, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, Metrics]:
    x0 = batch["x0"]
    key_t, key_z, key_v, key_dropout = jax.random.split(key, 4)
    doublings = jnp.minimum(step // double_every, math.ceil(math.log2(last / first)))
    n = jnp.minimum(first * 2**doublings, last)
    sigma, lower = adjacent_times(key_t, x0.shape[0], n, p_mean=p_mean, p_std=p_std)
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    cond = cfg.sample_scale(key_v, sigma, batch["cond"], guidance)
    wide = functools.partial(trigflow.expand, x=x0)

    def slope(x: Array, sigma: Array) -> Array:
      """Returns dx/dsigma = (x - d) / sigma, where d is the denoised value."""
      t = jnp.arctan(sigma / sigma_d)
      xt = x * wide(jnp.cos(t))
      v = velocity_of(frozen, x0, z, xt, t, cond)
      d = wide(jnp.cos(t)) * xt - wide(jnp.sin(t)) * v
      return (x - d) / wide(sigma)

    x = x0 + wide(sigma / sigma_d) * z
    gap = wide(sigma - lower)
    at_x = slope(x, sigma)
    y = x - gap / 2 * (at_x + slope(x - gap * at_x, lower))
    net = functools.partial(network.apply, params, key=key_dropout)
    f = functools.partial(consistency, net, cond=cond, sigma_d=sigma_d)
    change = f(x, sigma) - jax.lax.stop_gradient(f(y, lower))
    D = change[0].size
    square = jnp.sum(jnp.square(change), tuple(range(1, change.ndim)))
    C = c * math.sqrt(D)
    distance = (jnp.sqrt(square + C**2) - C) / (sigma - lower)
    return jnp.mean(distance), {"mse": jnp.mean(square) / D, "levels": n}

  return loss
