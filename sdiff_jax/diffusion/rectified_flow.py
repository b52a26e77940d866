"""Rectified flow as an exact change of variables of TrigFlow.

The process x = (1 - tau) x0 + tau z, tau in [0, 1], with noise z of standard deviation
sigma_d, is TrigFlow's at t = arctan(tau / (1 - tau)), rescaled: x_t = x / h with
h = (tau^2 + (1 - tau)^2)^(1/2). A two-time network F so has an average velocity u with

  x_r = x_tau - (tau - r) u,  u = (sigma_d F(x_t / sigma_d, t, s) + (2 tau - 1) x_t) / h,

where s belongs to r. It depends on r only through F, and nothing is divided by tau - r.
"""

from collections.abc import Callable

import jax.numpy as jnp

from sdiff_jax.diffusion import trigflow
from sdiff_jax.diffusion.trigflow import expand
from sdiff_jax.types import Array, Cond, NetFn

# (x [B, ...], tau [B], r [B], cond) -> u [B, ...].
AverageVelocity = Callable[[Array, Array, Array, Cond], Array]


def angle(tau: Array) -> Array:
  """Returns the TrigFlow time t = arctan(tau / (1 - tau)), [B].

  Args:
    tau: times of rectified flow in [0, 1], [B].

  Example:
    >>> angle(jnp.array([0.0, 0.5])).round(4).tolist()
    [0.0, 0.7853999733924866]
  """
  return jnp.arctan2(tau, 1 - tau)


def time(t: Array) -> Array:
  """Returns tau = sin t / (sin t + cos t), [B]; inverse of `angle`.

  Args:
    t: TrigFlow times, [B].

  Example:
    >>> float(time(angle(jnp.float32(0.25))))
    0.25
  """
  return jnp.sin(t) / (jnp.sin(t) + jnp.cos(t))


def perturb(x0: Array, z: Array, tau: Array) -> Array:
  """Returns x = (1 - tau) x0 + tau z, [B, ...].

  Args:
    x0: data, [B, ...].
    z: noise of standard deviation sigma_d, [B, ...].
    tau: times of rectified flow, [B].

  Example:
    >>> perturb(jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.array([0.25])).tolist()
    [[0.75, 0.75]]
  """
  tau = expand(tau, x0)
  return (1 - tau) * x0 + tau * z


def to_trigflow(x: Array, tau: Array) -> Array:
  """Returns the TrigFlow state x_t = x / h, [B, ...].

  Args:
    x: states of rectified flow, [B, ...].
    tau: their times, [B].

  Example:
    >>> to_trigflow(jnp.ones((1, 2)), jnp.zeros(1)).tolist()
    [[1.0, 1.0]]
  """
  return x / _length(tau, x)


def velocity(v: Array, x: Array, tau: Array) -> Array:
  """Returns the velocity dx/dtau that belongs to a TrigFlow velocity dx_t/dt.

  It is (v + (2 tau - 1) x_t) / h; of v = cos(t) z - sin(t) x0 it is z - x0.

  Args:
    v: dx_t/dt at the state x_t = x / h, [B, ...].
    x: states of rectified flow, [B, ...].
    tau: their times, [B].

  Example:
    >>> velocity(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.zeros(1)).tolist()
    [[-1.0, -1.0]]
  """
  length = _length(tau, x)
  return (v + expand(2 * tau - 1, x) * x / length) / length


def average_velocity(net: NetFn, sigma_d: float) -> AverageVelocity:
  """Returns u(x, tau, r, cond) of a two-time TrigFlow network.

  Scaling and times are part of the function, so a jvp through it is complete.

  Args:
    net: network with its parameters bound, which takes the condition "end_time".
    sigma_d: standard deviation of the data.

  Example:
    >>> u = average_velocity(lambda x, t, cond: -x, sigma_d=0.5)
    >>> u(jnp.ones((1, 2)), jnp.zeros(1), jnp.zeros(1), None).tolist()
    [[-2.0, -2.0]]
  """

  def u(x: Array, tau: Array, r: Array, cond: Cond) -> Array:
    cond = trigflow.with_end_time(cond, angle(r))
    F = net(to_trigflow(x, tau) / sigma_d, angle(tau), cond)
    return velocity(sigma_d * F, x, tau)

  return u


def _length(tau: Array, x: Array) -> Array:
  """Returns h = (tau^2 + (1 - tau)^2)^(1/2), [B, 1, ...]."""
  return expand(jnp.sqrt(tau**2 + (1 - tau) ** 2), x)
