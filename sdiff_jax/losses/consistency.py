"""Consistency models before sCM: discrete pairs of noise levels, EDM's f, pseudo-Huber.

Consistency distillation and training of arXiv:2303.01469 with the improvements of
arXiv:2310.14189 (iCT): no average in the target, pseudo-Huber metric, weights
1 / (sigma_{i+1} - sigma_i), log-normal levels, and a grid that doubles.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.losses import _velocity
from sdiff_jax.types import Array, Cond, LossFn, NetFn, Network, Params, PRNGKey


def consistency(
  net: NetFn, x: Array, sigma: Array, cond: Cond, *, sigma_d: float
) -> Array:
  """Returns f(x, sigma) = c_skip x + c_out (-F), identity at sigma = 0.002.

  c_skip = sigma_d^2 / ((sigma - eps)^2 + sigma_d^2) and
  c_out = sigma_d (sigma - eps) / sqrt(sigma^2 + sigma_d^2), eps = 0.002
  (arXiv:2303.01469, appendix C). With eps = 0 it is TrigFlow's f.

  Args:
    net: TrigFlow network; it sees x / sqrt(sigma^2 + sigma_d^2), which is
      x_t / sigma_d, and the angle arctan(sigma / sigma_d).
    x: x0 + sigma eps, [B, ...].
    sigma: noise levels, [B].
    cond: conditions of the network.
    sigma_d: standard deviation of the data.
  """
  above = sigma - time_grids.SIGMA_MIN
  length = jnp.sqrt(sigma**2 + sigma_d**2)
  skip = sigma_d**2 / (above**2 + sigma_d**2)
  F = net(x / trigflow.expand(length, x), jnp.arctan(sigma / sigma_d), cond)
  return trigflow.expand(skip, x) * x - trigflow.expand(sigma_d * above / length, x) * F


def adjacent_times(
  key: PRNGKey, batch: int, n: Array, *, p_mean: float, p_std: float
) -> tuple[Array, Array]:
  """Draws neighbouring levels of EDM's grid of n + 1, higher and lower, [B] each.

  A pair has the mass of ln(sigma) ~ N(p_mean, p_std^2) between its levels
  (arXiv:2310.14189, section 3.5), on [0.002, 80].
  """
  low, high = (s ** (1 / 7) for s in (time_grids.SIGMA_MIN, time_grids.SIGMA_MAX))
  edges = [
    (math.log(s) - p_mean) / p_std for s in (time_grids.SIGMA_MIN, time_grids.SIGMA_MAX)
  ]
  tau = p_mean + p_std * jax.random.truncated_normal(key, *edges, (batch,), jnp.float32)
  ramp = (jnp.exp(tau / 7) - low) / (high - low)
  n = n.astype(jnp.float32)
  i = jnp.clip(jnp.floor(ramp * n), 0, n - 1)
  below, above = ((low + j / n * (high - low)) ** 7 for j in (i, i + 1))
  return above, below


@registry.register("losses", "consistency")
def build(
  *,
  network: Network,
  teacher: Callable[..., Array] | None,
  sigma_d: float,
  velocity: str = "data",
  levels: tuple[int, int] = (10, 1280),
  double_every: int = 50_000,
  p_mean: float = -1.1,
  p_std: float = 2.0,
  c: float = 0.00054,
  guidance: tuple[float, ...] = (),
) -> LossFn:
  """Returns E[(sqrt(|f(x, sigma) - f^-(y, sigma')|^2 + C^2) - C) / (sigma - sigma')].

  y is a step of Heun's from x along the velocity, to the next lower level; along the
  data's it is x0 + sigma' eps, with the noise of x. C = c sqrt(D).

  Args:
    network: the model to train.
    teacher: (frozen, x, t, cond) -> F of the teacher; unused by "data".
    sigma_d: standard deviation of the data.
    velocity: "data" trains from data (CT), "teacher" distils (CD).
    levels: steps of the grid at first and at last.
    double_every: training steps after which the grid doubles.
    p_mean: mean of ln(sigma) over training.
    p_std: its standard deviation.
    c: constant of the metric, for one dimension.
    guidance: (low, high) scales of classifier-free guidance to distil, () for none.

  Raises:
    ValueError: an unknown velocity, guidance without a teacher, or levels that fall.
  """
  first, last = levels
  if not 1 <= first <= last:
    raise ValueError(f"loss.levels={tuple(levels)}: give two, from 1, that do not fall")
  if double_every < 1:
    raise ValueError(f"loss.double_every={double_every}: must be above 0")
  guidance = tuple(guidance)
  velocity_of = _velocity.velocity_target(
    velocity, teacher, sigma_d=sigma_d, guidance=guidance
  )

  def loss(
    params: Params, batch: dict, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, dict[str, Array]]:
    x0 = batch["x0"]
    key_t, key_z, key_v, key_dropout = jax.random.split(key, 4)
    doublings = jnp.minimum(step // double_every, math.ceil(math.log2(last / first)))
    n = jnp.minimum(first * 2**doublings, last)
    sigma, lower = adjacent_times(key_t, x0.shape[0], n, p_mean=p_mean, p_std=p_std)
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    cond = _velocity.sample_guidance_scale(key_v, sigma, batch["cond"], guidance)
    wide = functools.partial(trigflow.expand, x=x0)

    def slope(x: Array, sigma: Array) -> Array:
      """dx/dsigma = (x - d) / sigma, d the denoised."""
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
