"""TrigFlow: x_t = cos(t) x0 + sin(t) z, its network form, and maps to other forms.

Lu & Song, arXiv:2410.11081, section 3 and appendix B. A network F predicts the
velocity dx_t/dt = cos(t) z - sin(t) x0 as sigma_d F(x_t / sigma_d, t); with it the
denoiser and the consistency function are one formula. All functions are pure and
differentiable; t is [B], data are [B, ...].
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp
import numpy as np

from sdiff_jax.types import Array, Cond, NetFn

END_TIME = "end_time"  # the condition of a flow map that holds its second time


def expand(t: Array, x: Array) -> Array:
  """Returns t [B] with axes of length 1 appended, to broadcast against x [B, ...].

  Args:
    t: one value for each sample, [B].
    x: an array whose leading axis is the batch, [B, ...].

  Example:
    >>> expand(jnp.ones(2), jnp.ones((2, 8, 8, 1))).shape
    (2, 1, 1, 1)
  """
  chex.assert_equal_shape_prefix((t, x), t.ndim)
  return jnp.reshape(t, t.shape + (1,) * (x.ndim - t.ndim))


def perturb(x0: Array, z: Array, t: Array) -> Array:
  """Returns x_t = cos(t) x0 + sin(t) z, [B, ...].

  Args:
    x0: data, [B, ...].
    z: noise of standard deviation sigma_d, [B, ...].
    t: TrigFlow times, [B].

  Example:
    >>> perturb(jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.zeros(1)).tolist()
    [[1.0, 1.0]]
  """
  chex.assert_equal_shape((x0, z))
  t = expand(t, x0)
  return jnp.cos(t) * x0 + jnp.sin(t) * z


def velocity(x0: Array, z: Array, t: Array) -> Array:
  """Returns dx_t/dt = cos(t) z - sin(t) x0, [B, ...].

  Args:
    x0: data, [B, ...].
    z: noise of standard deviation sigma_d, [B, ...].
    t: TrigFlow times, [B].

  Example:
    >>> velocity(jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.zeros(1)).tolist()
    [[0.0, 0.0]]
  """
  chex.assert_equal_shape((x0, z))
  t = expand(t, x0)
  return jnp.cos(t) * z - jnp.sin(t) * x0


def rotate(xt: Array, F: Array, t: Array, s: Array, sigma_d: float) -> Array:
  """Returns the first-order step cos(t - s) xt - sin(t - s) sigma_d F to angle s.

  It is DDIM, and exact where x0 and z are constant along the path (section 3).

  Args:
    xt: state at angle t, [B, ...].
    F: network output at (xt / sigma_d, t), [B, ...].
    t: angles now, [B].
    s: angles after the step, [B].
    sigma_d: standard deviation of the data.

  Example:
    >>> t, s = jnp.ones(1), jnp.ones(1)
    >>> rotate(jnp.ones((1, 2)), jnp.ones((1, 2)), t, s, 0.5).tolist()
    [[1.0, 1.0]]
  """
  chex.assert_equal_shape((xt, F))
  step = expand(t - s, xt)
  return jnp.cos(step) * xt - jnp.sin(step) * sigma_d * F


def denoise(xt: Array, F: Array, t: Array, sigma_d: float) -> Array:
  """Returns cos(t) xt - sin(t) sigma_d F, [B, ...]: `rotate` to angle 0.

  With F a diffusion network it is the denoiser, with F a consistency model the
  consistency function f; f(x, 0) = x holds for any F (section 3).

  Args:
    xt: states at times t, [B, ...].
    F: network output at (xt / sigma_d, t), [B, ...].
    t: TrigFlow times, [B].
    sigma_d: standard deviation of the data.

  Example:
    >>> denoise(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.zeros(1), 0.5).tolist()
    [[1.0, 1.0]]
  """
  return rotate(xt, F, t, jnp.zeros_like(t), sigma_d)


def with_end_time(cond: Cond, s: Array) -> Cond:
  """Returns conditions with the end time s [B] of a flow map.

  Args:
    cond: the other conditions, or None.
    s: the time of the state that the flow map returns, [B].

  Example:
    >>> with_end_time(None, jnp.zeros(2))[END_TIME].tolist()
    [0.0, 0.0]
  """
  return {**(cond or {}), END_TIME: s}


def denoiser(net: NetFn, sigma_d: float) -> Callable[[Array, Array, Cond], Array]:
  """Returns the Denoiser (xt, t, cond) -> d of a network.

  Args:
    net: a network with its parameters bound.
    sigma_d: standard deviation of the data.

  Example:
    >>> apply = denoiser(lambda x, t, cond: jnp.zeros_like(x), sigma_d=0.5)
    >>> apply(jnp.ones((1, 2)), jnp.zeros(1), None).tolist()
    [[1.0, 1.0]]
  """

  def apply(xt: Array, t: Array, cond: Cond) -> Array:
    return denoise(xt, net(xt / sigma_d, t, cond), t, sigma_d)

  return apply


# Time and state of other processes. A process x' = alpha x0 + sigma eps, eps of unit
# variance, is TrigFlow's up to a rescaling: t = arctan(sigma / (sigma_d alpha)).


def angle(
  alpha: Array | np.ndarray, sigma: Array | np.ndarray, sigma_d: float
) -> Array:
  """Returns t = arctan(sigma / (sigma_d alpha)) in [0, pi/2] (eq. 29).

  Args:
    alpha: coefficient of the data in the other process, [B].
    sigma: standard deviation of its noise, [B].
    sigma_d: standard deviation of the data.

  Example:
    >>> round(float(angle(jnp.ones(()), jnp.ones(()), 1.0)), 4)
    0.7854
  """
  return jnp.arctan2(sigma, sigma_d * alpha)


def from_process(x: Array, alpha: Array, sigma: Array, sigma_d: float) -> Array:
  """Returns x_t = x sigma_d / sqrt(alpha^2 sigma_d^2 + sigma^2) (eq. 29).

  Args:
    x: states of the process x' = alpha x0 + sigma eps, [B, ...].
    alpha: coefficient of the data in the other process, [B].
    sigma: standard deviation of its noise, [B].
    sigma_d: standard deviation of the data.

  Example:
    >>> from_process(jnp.ones((1, 2)), jnp.ones(1), jnp.zeros(1), 0.5).tolist()
    [[1.0, 1.0]]
  """
  return x * (sigma_d / _norm(alpha, sigma, sigma_d, x))


def to_process(xt: Array, alpha: Array, sigma: Array, sigma_d: float) -> Array:
  """Returns the state of x' = alpha x0 + sigma eps; inverse of `from_process`.

  Args:
    xt: TrigFlow states, [B, ...].
    alpha: coefficient of the data in the other process, [B].
    sigma: standard deviation of its noise, [B].
    sigma_d: standard deviation of the data.

  Example:
    >>> to_process(jnp.ones((1, 2)), jnp.ones(1), jnp.zeros(1), 0.5).tolist()
    [[1.0, 1.0]]
  """
  return xt * (_norm(alpha, sigma, sigma_d, xt) / sigma_d)


def _norm(alpha: Array, sigma: Array, sigma_d: float, x: Array) -> Array:
  return expand(jnp.sqrt((alpha * sigma_d) ** 2 + sigma**2), x)


# Wrappers: networks of other parametrisations as a NetFn. The wrapper's own
# dependence on t is part of the function, so a jvp through it is complete.


def from_edm(raw: NetFn, sigma_d: float) -> NetFn:
  """Returns F(x, t) = -raw(x, ln(sigma_d tan t) / 4) (reference eq. 30).

  Args:
    raw: EDM's or EDM2's inner network (c_in x, c_noise, cond) -> output, for which
      D = c_skip x + c_out raw (arXiv:2206.00364, table 1).
    sigma_d: standard deviation of the data.

  Returns:
    An exact NetFn for t in (0, pi/2); dF/dt grows without bound at both ends.

  Example:
    >>> net = from_edm(lambda x, c_noise, cond: 2 * x, sigma_d=0.5)
    >>> net(jnp.ones((1, 2)), jnp.ones(1), None).tolist()
    [[-2.0, -2.0]]
  """

  def net(x: Array, t: Array, cond: Cond) -> Array:
    return -raw(x, jnp.log(sigma_d * jnp.tan(t)) / 4, cond)

  return net


def from_vp(
  raw: NetFn, prediction: str, time: Callable[[Array], Array], sigma_d: float
) -> NetFn:
  """Wraps a variance-preserving network x' = alpha x0 + sigma eps, alpha^2+sigma^2=1.

  Args:
    raw: network (x' [B, ...], time [B], cond) -> prediction.
    prediction: "eps", "v" (= alpha eps - sigma x0) or "x0".
    time: alpha [B] -> the time that raw expects [B].
    sigma_d: standard deviation of the data.

  Returns:
    F = (cos t x_t - x0) / (sigma_d sin t), in forms without 0/0 where they exist.

  Raises:
    ValueError: the prediction is not one of the three.

  Example:
    >>> net = from_vp(lambda x, time, cond: x, "eps", lambda alpha: alpha, sigma_d=1.0)
    >>> net(jnp.ones((1, 2)), jnp.zeros(1), None).tolist()
    [[1.0, 1.0]]
  """
  if prediction not in ("eps", "v", "x0"):
    raise ValueError(f"prediction={prediction!r}: take 'eps', 'v' or 'x0'")

  def net(x: Array, t: Array, cond: Cond) -> Array:
    # tan t = sigma / (sigma_d alpha), so 1 / |(alpha, sigma)| rescales to VP.
    scale = 1 / jnp.sqrt(jnp.cos(t) ** 2 + (sigma_d * jnp.sin(t)) ** 2)
    alpha, sigma = jnp.cos(t) * scale, sigma_d * jnp.sin(t) * scale
    out = raw(x * sigma_d * expand(scale, x), time(alpha), cond)
    c, s, alpha, sigma = (expand(a, x) for a in (jnp.cos(t), jnp.sin(t), alpha, sigma))
    xt = x * sigma_d
    if prediction == "eps":  # x_t = cos t x0 + sin t sigma_d eps
      return (out - s * x) / c
    if prediction == "x0":
      return (c * xt - out) / (sigma_d * s)
    vp = xt * expand(scale, x)
    x0, eps = alpha * vp - sigma * out, sigma * vp + alpha * out
    return c * eps - s * x0 / sigma_d

  return net


def from_flow(raw: NetFn, sigma_d: float) -> NetFn:
  """Wraps a rectified flow x' = (1 - u) x0 + u eps, raw(x', u, cond) = eps - x0.

  F = c eps - s x0 / sigma_d with x0 = x' - u raw and eps = x' + (1 - u) raw, where
  u = sigma_d tan t / (1 + sigma_d tan t); free of 0/0 on all of [0, pi/2].

  Args:
    raw: network of the rectified flow, (x' [B, ...], u [B], cond) -> eps - x0.
    sigma_d: standard deviation of the data.

  Returns:
    A NetFn, exact for t in [0, pi/2].

  Example:
    >>> net = from_flow(lambda x, u, cond: -x, sigma_d=0.5)
    >>> net(jnp.ones((1, 2)), jnp.zeros(1), None).tolist()
    [[0.0, 0.0]]
  """

  def net(x: Array, t: Array, cond: Cond) -> Array:
    c, s = jnp.cos(t), jnp.sin(t)
    total = c + sigma_d * s
    u = sigma_d * s / total
    x_flow = x * expand(sigma_d / total, x)
    out = raw(x_flow, u, cond)
    c, s, u = expand(c, x), expand(s, x), expand(u, x)
    return c * (x_flow + (1 - u) * out) - s * (x_flow - u * out) / sigma_d

  return net
