"""Discrete-time sCM: a finite difference in place of the tangent (appendix E).

dsCT and dsCD of arXiv:2410.11081, the control of its figure 5c: the same objective over
a grid of N noise levels, whose tangent tends to the continuous one as N grows, until
float32 cannot tell neighbours apart.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.losses import scm
from sdiff_jax.types import Array, Cond, LossFn, NetFn, Network, PRNGKey


def tangent(
  net: NetFn,
  xt: Array,
  t: Array,
  v: Array,
  cond: Cond,
  *,
  sigma_d: float,
  r: Array | float = 1.0,
  s: Array,
) -> tuple[Array, Array]:
  """Returns F and g = cos(t) (f(x_t, t) - f(x_s, s)) / sin(t - s).

  x_s = cos(t - s) x_t - sin(t - s) v is one DDIM step along v, and with u = t - s
  g = -cos t (cos s (sigma_d F - v)
              + r sin s (x_t + sigma_d (cos u F - F(x_s, s)) / sin u)),
  which subtracts no two f that are nearly equal (appendix E, with sigma_d).

  Args:
    net: network with its parameters bound.
    xt: states, [B, ...].
    t: angles, [B].
    v: dx_t/dt at xt, [B, ...].
    cond: conditions of the network.
    sigma_d: standard deviation of the data.
    r: warm-up in [0, 1].
    s: the angle below each t on the grid, [B], s < t.

  Returns:
    F [B, ...], through which gradients flow, and g [B, ...], through which not.
  """
  chex.assert_equal_shape((xt, v))
  chex.assert_equal_shape((t, s))
  F = net(xt / sigma_d, t, cond)
  xs = trigflow.rotate(xt, v / sigma_d, t, s, sigma_d)
  u = trigflow.expand(t - s, xt)
  slope = (jnp.cos(u) * F - net(xs / sigma_d, s, cond)) / jnp.sin(u)
  c, c_s, s_s = (trigflow.expand(a, xt) for a in (jnp.cos(t), jnp.cos(s), jnp.sin(s)))
  g = -c * (c_s * (sigma_d * F - v) + r * s_s * (xt + sigma_d * slope))
  return F, jax.lax.stop_gradient(g)


@registry.register("losses", "scm_discrete")
def build(
  *,
  network: Network,
  teacher: Callable[..., Array] | None,
  sigma_d: float,
  n: int = 1024,
  velocity: str = "teacher",
  p_mean: float = -1.0,
  p_std: float = 1.4,
  tangent_normalizer: str = "rms",
  c: float = 0.1,
  warmup_steps: int = 10_000,
  adaptive_weight: bool = True,
  guidance: tuple[float, ...] = (),
) -> LossFn:
  """Returns the objective of `scm` with the tangent of this file.

  Args:
    network: the model to train.
    teacher: (frozen, x, t, cond) -> F of the teacher; unused by "data".
    sigma_d: standard deviation of the data.
    n: levels N of the grid, EDM's with 0 below them; the paper tries 256 to 4096.
    velocity: "teacher" distils (dsCD), "data" trains from data (dsCT).
    p_mean: mean of ln(sigma_d tan t) over training.
    p_std: its standard deviation.
    tangent_normalizer: see `scm`; so are the others.
    c: constant of the normalisation.
    warmup_steps: steps over which r rises from 0 to 1.
    adaptive_weight: learn w_phi(t); otherwise w = 0.
    guidance: (low, high) scales of classifier-free guidance to distil, () for none.

  Raises:
    ValueError: as `scm`, or n is below 2.
  """
  if n < 2:
    raise ValueError(f"loss.n={n}: a grid has 2 levels at least")
  grid = np.float32(np.append(0.0, time_grids.karras_angles(n, sigma_d)[-2::-1]))

  def draw(key: PRNGKey, batch: int) -> tuple[Array, Array, Array]:
    t = time_grids.log_normal(key, batch, p_mean=p_mean, p_std=p_std, sigma_d=sigma_d)
    i = jnp.clip(jnp.searchsorted(grid, t), 1, n)  # each cell by its mass
    above, below = jnp.asarray(grid)[i], jnp.asarray(grid)[i - 1]
    return above, below, above

  return scm.objective(
    draw,
    tangent,
    network=network,
    teacher=teacher,
    sigma_d=sigma_d,
    velocity=velocity,
    tangent_normalizer=tangent_normalizer,
    c=c,
    warmup_steps=warmup_steps,
    adaptive_weight=adaptive_weight,
    guidance=guidance,
  )
