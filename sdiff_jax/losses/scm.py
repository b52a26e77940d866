"""Continuous-time consistency models: sCT and sCD (arXiv:2410.11081).

The two differ in the velocity alone: of the data (training) or of a teacher
(distillation).
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from sdiff_jax import times, trigflow
from sdiff_jax.interfaces import Array, Cond, LossFn, NetFn, Network, Params, PRNGKey
from sdiff_jax.losses import velocities, weighting


def tangent(
  net: NetFn,
  xt: Array,
  t: Array,
  v: Array,
  cond: Cond,
  *,
  sigma_d: float,
  r: Array | float = 1.0,
) -> tuple[Array, Array]:
  """Returns F and the tangent g = cos(t) df/dt of the consistency function.

  g = -cos^2(t) (sigma_d F - v) - r (cos(t) sin(t) x_t + sigma_d J), where
  J = cos(t) sin(t) dF/dt comes from one jvp with the tangents
  (cos(t) sin(t) v / sigma_d, cos(t) sin(t)): multiplied before, not after, since
  dF/dt alone overflows half precision near t = 0 and pi/2. F is the primal of that
  jvp. (Section 5.1; the line printed there lacks a factor sigma_d.)

  Args:
    net: network with its parameters bound.
    xt: states, [B, ...].
    t: angles, [B].
    v: dx_t/dt at xt, [B, ...].
    cond: conditions of the network.
    sigma_d: standard deviation of the data.
    r: warm-up in [0, 1]; at 1 g is the true tangent (appendix D).

  Returns:
    F [B, ...], through which gradients flow, and g [B, ...], through which not.
  """
  chex.assert_equal_shape((xt, v))
  c, s = jnp.cos(t), jnp.sin(t)
  c_x, s_x = trigflow.expand(c, xt), trigflow.expand(s, xt)
  F, J = jax.jvp(
    lambda x, t: net(x, t, cond),
    (xt / sigma_d, t),
    (c_x * s_x * v / sigma_d, c * s),
  )
  g = -(c_x**2) * (sigma_d * F - v) - r * (c_x * s_x * xt + sigma_d * J)
  return F, jax.lax.stop_gradient(g)


def norm(g: Array, *, rms: bool) -> Array:
  """Returns |g| of each sample, [B, 1, ...]: L2, or root mean square over D."""
  axes = tuple(range(1, g.ndim))
  reduce = jnp.mean if rms else jnp.sum
  return jnp.sqrt(reduce(jnp.square(g), axes, keepdims=True))


def _rms(g: Array, t: Array, c: float) -> Array:
  return g / (norm(g, rms=True) + c)


def _l2(g: Array, t: Array, c: float) -> Array:
  return g / (norm(g, rms=False) + c)


def _clip(g: Array, t: Array, c: float) -> Array:
  # clip(df/dt, -1, 1) cos(t), with g = cos(t) df/dt
  bound = trigflow.expand(jnp.cos(t), g)
  return jnp.clip(g, -bound, bound)


def _none(g: Array, t: Array, c: float) -> Array:
  return g


# How g [B, ...] at angles t [B] is tamed, given c (section 4.2).
STABILISERS: dict[str, Callable[[Array, Array, float], Array]] = {
  "rms": _rms,
  "l2": _l2,
  "clip": _clip,
  "none": _none,
}


def build(
  *,
  network: Network,
  teacher: Callable[..., Array] | None,
  sigma_d: float,
  velocity: str = "teacher",
  p_mean: float = -1.0,
  p_std: float = 1.4,
  stabiliser: str = "rms",
  c: float = 0.1,
  warmup_steps: int = 10_000,
  adaptive_weight: bool = True,
  guidance: tuple[float, ...] = (),
) -> LossFn:
  """Returns E[e^w |F - F^- - g|^2 / D - w], with g tamed by `stabiliser` (eq. 8).

  Args:
    network: the model to train.
    teacher: (frozen, x, t, cond) -> F of the teacher; unused by "data".
    sigma_d: standard deviation of the data.
    velocity: "teacher" distils (sCD), "data" trains from data (sCT).
    p_mean: mean of ln(sigma_d tan t) over training.
    p_std: its standard deviation.
    stabiliser: "rms" or "l2": g / (|g| + c); "clip": df/dt to [-1, 1]; "none".
    c: constant of the normalisation.
    warmup_steps: steps over which r rises from 0 to 1.
    adaptive_weight: learn w_phi(t); otherwise w = 0.
    guidance: (low, high) scales of classifier-free guidance to distil, () for none.

  Raises:
    ValueError: an unknown velocity or stabiliser, or guidance without a teacher.
  """
  if velocity not in ("data", "teacher"):
    raise ValueError(f"loss.velocity={velocity!r}: take 'teacher' or 'data'")
  if stabiliser not in STABILISERS:
    raise ValueError(f"loss.stabiliser={stabiliser!r}: take one of {[*STABILISERS]}")
  if guidance and velocity == "data":
    raise ValueError(f"loss.guidance={guidance}: only loss.velocity='teacher' can")
  if velocity == "data":
    velocity_of = velocities.data()
  else:
    velocity_of = velocities.teacher(
      teacher, sigma_d=sigma_d, guidance=tuple(guidance) or None
    )
  tame = STABILISERS[stabiliser]

  def loss(
    params: Params, batch: dict, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, dict[str, Array]]:
    x0 = batch["x0"]
    key_t, key_z, key_v, key_dropout = jax.random.split(key, 4)
    t = times.log_normal(
      key_t, x0.shape[0], p_mean=p_mean, p_std=p_std, sigma_d=sigma_d
    )
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    xt = trigflow.perturb(x0, z, t)
    v, cond = velocity_of(frozen, x0, z, xt, t, batch["cond"], key_v)
    net = functools.partial(network.apply, params, key=key_dropout)
    r = times.warmup(step, warmup_steps)
    F, g = tangent(net, xt, t, v, cond, sigma_d=sigma_d, r=r)
    error = F - jax.lax.stop_gradient(F) - tame(g, t, c)
    w = network.logvar(params, t) if adaptive_weight else None
    weighted, mse = weighting.adaptive(error, w)
    tangent_norm = jnp.mean(norm(g, rms=True))
    return jnp.mean(weighted), {"mse": jnp.mean(mse), "tangent_norm": tangent_norm}

  return loss
