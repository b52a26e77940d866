"""Continuous-time consistency models: sCT and sCD (arXiv:2410.11081).

The two differ in the velocity alone: of the data (training) or of a teacher
(distillation).
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.losses import _velocity, _weighting
from sdiff_jax.types import Array, Cond, LossFn, NetFn, Network, Params, PRNGKey


def tangent(
  net: NetFn,
  xt: Array,
  t: Array,
  v: Array,
  cond: Cond,
  *,
  sigma_d: float,
  r: Array | float = 1.0,
  s: Array | float = 0.0,
) -> tuple[Array, Array]:
  """Returns F and the tangent g = cos(t - s) df/dt of the consistency function to s.

  f(x_t, t) = cos(t - s) x_t - sin(t - s) sigma_d F is the state at angle s. With
  u = t - s, g = -cos^2(u) (sigma_d F - v) - r (cos(u) sin(u) x_t + sigma_d J), where
  J = cos(u) sin(u) dF/dt comes from one jvp with the tangents
  (cos(u) sin(u) v / sigma_d, cos(u) sin(u)): multiplied before, not after, since
  dF/dt alone overflows half precision near t = 0 and pi/2. F is the primal of that
  jvp. (Section 5.1, where s = 0; the line printed there lacks a factor sigma_d.)

  Args:
    net: network with its parameters bound.
    xt: states, [B, ...].
    t: angles, [B].
    v: dx_t/dt at xt, [B, ...].
    cond: conditions of the network.
    sigma_d: standard deviation of the data.
    r: warm-up in [0, 1]; at 1 g is the true tangent (appendix D).
    s: angle that f leads to, a scalar or [B], s <= t; 0 is the data. At s = t,
      g = v - sigma_d F: flow matching.

  Returns:
    F [B, ...], through which gradients flow, and g [B, ...], through which not.
  """
  chex.assert_equal_shape((xt, v))
  c, cs = jnp.cos(t - s), jnp.cos(t - s) * jnp.sin(t - s)
  c_x, cs_x = trigflow.expand(c, xt), trigflow.expand(cs, xt)
  F, J = jax.jvp(
    lambda x, t: net(x, t, cond),
    (xt / sigma_d, t),
    (cs_x * v / sigma_d, cs),
  )
  g = -(c_x**2) * (sigma_d * F - v) - r * (cs_x * xt + sigma_d * J)
  return F, jax.lax.stop_gradient(g)


def tangent_terms(
  net: NetFn, xt: Array, t: Array, v: Array, cond: Cond, *, sigma_d: float
) -> dict[str, Array]:
  """Returns the terms of the tangent g = cos(t) df/dt, [B, ...] each.

  With f's df/dt = -cos(t) (sigma_d F - v) - sin(t) (x_t + sigma_d dF/dt) and dF/dt =
  grad_x F v / sigma_d + d_t F (arXiv:2410.11081, eq. 6 and section 4.1):

    "velocity"  -cos^2(t) (sigma_d F - v)
    "state"     -cos(t) sin(t) x_t
    "grad_x"    -cos(t) sin(t) grad_x F v
    "d_t"       -cos(t) sin(t) sigma_d d_t F

  The arguments are those of `tangent`, whose g is the sum; here are two jvps.
  """
  c, cs = jnp.cos(t), jnp.cos(t) * jnp.sin(t)
  c_x, cs_x = trigflow.expand(c, xt), trigflow.expand(cs, xt)
  x = xt / sigma_d
  F, along_x = jax.jvp(lambda x: net(x, t, cond), (x,), (cs_x * v / sigma_d,))
  _, along_t = jax.jvp(lambda t: net(x, t, cond), (t,), (cs,))
  return {
    "velocity": -(c_x**2) * (sigma_d * F - v),
    "state": -cs_x * xt,
    "grad_x": -sigma_d * along_x,
    "d_t": -sigma_d * along_t,
  }


def norm(g: Array, *, rms: bool) -> Array:
  """Returns |g| of each sample, [B, 1, ...]: L2, or root mean square over D."""
  axes = tuple(range(1, g.ndim))
  reduce = jnp.mean if rms else jnp.sum
  return jnp.sqrt(reduce(jnp.square(g), axes, keepdims=True))


def _rms(g: Array, u: Array, c: float) -> Array:
  return g / (norm(g, rms=True) + c)


def _l2(g: Array, u: Array, c: float) -> Array:
  return g / (norm(g, rms=False) + c)


def _clip(g: Array, u: Array, c: float) -> Array:
  # clip(df/dt, -1, 1) cos(u), with g = cos(u) df/dt
  bound = trigflow.expand(jnp.cos(u), g)
  return jnp.clip(g, -bound, bound)


def _none(g: Array, u: Array, c: float) -> Array:
  return g


# How g = cos(u) df/dt [B, ...] is tamed, given u [B] and c (section 4.2).
TANGENT_NORMALIZERS: dict[str, Callable[[Array, Array, float], Array]] = {
  "rms": _rms,
  "l2": _l2,
  "clip": _clip,
  "none": _none,
}


def objective(
  draw: Callable[[PRNGKey, int], tuple[Array, Array, Array]],
  tangent_of: Callable[..., tuple[Array, Array]],
  *,
  network: Network,
  teacher: Callable[..., Array] | None,
  sigma_d: float,
  velocity: str,
  tangent_normalizer: str,
  c: float,
  warmup_steps: int,
  adaptive_weight: bool,
  guidance: tuple[float, ...],
) -> LossFn:
  """Returns E[e^w |F - F^- - g|^2 / D - w] for any tangent (eq. 8).

  Args:
    draw: (key, B) -> angles t, angles s that go with them, and u, [B] each.
    tangent_of: (net, xt, t, v, cond, *, sigma_d, r, s) -> (F, g = cos(u) df/dt), as
      `tangent`.
    network: see `build`; so are the others.

  Raises:
    ValueError: an unknown velocity or tangent_normalizer, or guidance without a teacher.
  """
  if tangent_normalizer not in TANGENT_NORMALIZERS:
    raise ValueError(
      f"loss.tangent_normalizer={tangent_normalizer!r}: take one of {[*TANGENT_NORMALIZERS]}"
    )
  guidance = tuple(guidance)
  velocity_of = _velocity.velocity_target(
    velocity, teacher, sigma_d=sigma_d, guidance=guidance
  )
  tame = TANGENT_NORMALIZERS[tangent_normalizer]

  def loss(
    params: Params, batch: dict, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, dict[str, Array]]:
    x0 = batch["x0"]
    key_t, key_z, key_v, key_dropout = jax.random.split(key, 4)
    t, s, u = draw(key_t, x0.shape[0])
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    xt = trigflow.perturb(x0, z, t)
    cond = _velocity.sample_guidance_scale(key_v, t, batch["cond"], guidance)
    v = velocity_of(frozen, x0, z, xt, t, cond)
    net = functools.partial(network.apply, params, key=key_dropout)
    r = time_grids.warmup(step, warmup_steps)
    F, g = tangent_of(net, xt, t, v, cond, sigma_d=sigma_d, r=r, s=s)
    error = F - jax.lax.stop_gradient(F) - tame(g, u, c)
    w = network.logvar(params, t) if adaptive_weight else None
    weighted, mse = _weighting.adaptive(error, w)
    tangent_norm = jnp.mean(norm(g, rms=True))
    return jnp.mean(weighted), {"mse": jnp.mean(mse), "tangent_norm": tangent_norm}

  return loss


@registry.register("losses", "scm")
def build(
  *,
  network: Network,
  teacher: Callable[..., Array] | None,
  sigma_d: float,
  velocity: str = "teacher",
  p_mean: float = -1.0,
  p_std: float = 1.4,
  segment_boundaries: tuple[float, ...] = (),
  tangent_normalizer: str = "rms",
  c: float = 0.1,
  warmup_steps: int = 10_000,
  adaptive_weight: bool = True,
  guidance: tuple[float, ...] = (),
) -> LossFn:
  """Returns E[e^w |F - F^- - g|^2 / D - w], with g tamed by `tangent_normalizer` (eq. 8).

  Args:
    network: the model to train.
    teacher: (frozen, x, t, cond) -> F of the teacher; unused by "data".
    sigma_d: standard deviation of the data.
    velocity: "teacher" distils (sCD), "data" trains from data (sCT).
    p_mean: mean of ln(sigma_d tan t) over training.
    p_std: its standard deviation.
    segment_boundaries: angles that cut [0, pi/2]; f leads to the lower end of its segment, and
      DDIM's steps from end to end sample it. () is the consistency model to 0.
    tangent_normalizer: "rms" or "l2": g / (|g| + c); "clip": df/dt to [-1, 1]; "none".
    c: constant of the normalisation.
    warmup_steps: steps over which r rises from 0 to 1.
    adaptive_weight: learn w_phi(t); otherwise w = 0.
    guidance: (low, high) scales of classifier-free guidance to distil, () for none.

  Raises:
    ValueError: an unknown velocity or tangent_normalizer, guidance without a teacher, or
      segment_boundaries that leave (0, pi/2).
  """
  if any(not 0 < end < np.pi / 2 for end in segment_boundaries):
    raise ValueError(
      f"loss.segment_boundaries={tuple(segment_boundaries)}: give angles in (0, pi/2)"
    )
  ends = np.float32([0.0, *sorted(segment_boundaries)])

  def draw(key: PRNGKey, batch: int) -> tuple[Array, Array, Array]:
    t = time_grids.log_normal(key, batch, p_mean=p_mean, p_std=p_std, sigma_d=sigma_d)
    s = jnp.asarray(ends)[jnp.searchsorted(ends, t, side="right") - 1]
    return t, s, t - s

  return objective(
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
