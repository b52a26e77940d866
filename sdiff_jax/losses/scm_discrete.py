"""Discrete-time sCM: a finite difference in place of the tangent (appendix E).

dsCT and dsCD of arXiv:2410.11081, the baselines of its figure 5c: the same loss on a
grid of N noise levels. The finite difference converges to the tangent as N grows, until
adjacent levels are equal in float32.
"""

from typing import Annotated

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.fields import Positive, Range
from sdiff_jax.losses import _tangent, _velocity
from sdiff_jax.losses._tangent import DEFAULT_OPTIONS, ConsistencyOptions, Times
from sdiff_jax.losses._velocity import TeacherFn, Velocity
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

  x_s = cos(t - s) x_t - sin(t - s) v is one DDIM step along v. With u = t - s
  g = -cos t (cos s (sigma_d F - v)
              + r sin s (x_t + sigma_d (cos u F - F(x_s, s)) / sin u)),
  which avoids the difference of two nearly equal f (appendix E, with sigma_d).

  Args:
    net: network with its parameters bound.
    xt: states, [B, ...].
    t: TrigFlow times, [B].
    v: dx_t/dt at xt, [B, ...].
    cond: conditions of the network.
    sigma_d: standard deviation of the data.
    r: warm-up in [0, 1].
    s: the time below each t on the grid, [B], s < t.

  Returns:
    F [B, ...], through which gradients flow, and g [B, ...], through which none flow.

  Raises:
    AssertionError: the shapes of xt and v, or of t and s, differ.

  Example:
    >>> xt, t, v = jnp.ones((2, 3)), jnp.full(2, 0.5), jnp.zeros((2, 3))
    >>> net = lambda x, t, cond: x
    >>> F, g = tangent(net, xt, t, v, None, sigma_d=0.5, s=t - 0.1)
    >>> F.shape, g.shape
    ((2, 3), (2, 3))
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


@registry.register(
  "losses",
  "scm_discrete",
  title=lambda fields: "dsCT" if fields["velocity"] == "data" else "dsCD",
  family="consistency",
  needs_teacher=lambda fields: fields["velocity"] == "teacher",
)
def build(
  *,
  network: Network,
  sigma_d: Positive,
  teacher: TeacherFn | None = None,
  n: Annotated[int, Range(2, 1_000_000)] = 1024,
  velocity: Velocity = "teacher",
  options: ConsistencyOptions = DEFAULT_OPTIONS,
) -> LossFn:
  """Returns the loss of `scm` with the finite difference of this file as its tangent.

  Args:
    network: the network to train.
    sigma_d: standard deviation of the data.
    teacher: the teacher network; only velocity="teacher" uses it.
    n: number N of levels of EDM's grid, to which 0 is added; the paper uses 256 to 4096.
    velocity: "teacher" distills a teacher (dsCD), "data" trains on data (dsCT).
    options: times, normalization, warm-up, weight and guidance.

  Returns:
    A LossFn that logs "mse" and "tangent_norm".

  Raises:
    ValueError: as `scm.build`, or n is below 2.

  Example:
    >>> import jax
    >>> network = Network(
    ...   init=lambda key: {"net": jnp.float32(0.5), "logvar": jnp.float32(0.0)},
    ...   apply=lambda params, x, t, cond, *, key=None: params["net"] * x,
    ...   logvar=lambda params, t: params["logvar"] * t,
    ... )
    >>> loss = build(network=network, sigma_d=0.5, velocity="data")
    >>> batch = {"x0": jnp.ones((4, 2)), "cond": None}
    >>> key, step = jax.random.key(0), jnp.int32(0)
    >>> value, metrics = loss(network.init(key), batch, key, step, None)
    >>> value.shape, sorted(metrics)
    ((), ['mse', 'tangent_norm'])
  """
  grid = np.asarray(
    np.append(0.0, time_grids.karras_timesteps(n, sigma_d)[-2::-1]), np.float32
  )

  def time_sampler(key: PRNGKey, batch: int) -> Times:
    t = time_grids.log_normal(
      key, batch, p_mean=options.p_mean, p_std=options.p_std, sigma_d=sigma_d
    )
    # The probability of a level is the log-normal mass of the cell below it.
    i = jnp.clip(jnp.searchsorted(grid, t), 1, n)
    above, below = jnp.asarray(grid)[i], jnp.asarray(grid)[i - 1]
    return Times(above, below, above)

  return _tangent.tangent_loss(
    network=network,
    sigma_d=sigma_d,
    time_sampler=time_sampler,
    velocity=_velocity.build(
      velocity, teacher, sigma_d=sigma_d, guidance=options.guidance
    ),
    tangent=tangent,
    options=options,
  )
