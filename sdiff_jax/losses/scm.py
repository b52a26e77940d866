"""Continuous-time consistency models: sCT and sCD (arXiv:2410.11081).

The two differ only in the velocity: that of the data (consistency training) or that of
a teacher (consistency distillation).
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
  s: Array | float = 0.0,
) -> tuple[Array, Array]:
  """Returns F and the tangent g = cos(t - s) df/dt of the consistency function to s.

  f(x_t, t) = cos(t - s) x_t - sin(t - s) sigma_d F is the state at time s. With
  u = t - s, g = -cos^2(u) (sigma_d F - v) - r (cos(u) sin(u) x_t + sigma_d J), where
  J = cos(u) sin(u) dF/dt comes from one jvp with the tangents
  (cos(u) sin(u) v / sigma_d, cos(u) sin(u)). These factors multiply the tangents before
  the jvp and not its result, because dF/dt alone overflows half precision near t = 0
  and pi/2. F is the primal output of the same jvp. (Section 5.1, where s = 0; the
  equation printed there lacks a factor sigma_d.)

  Args:
    net: network with its parameters bound.
    xt: states, [B, ...].
    t: TrigFlow times, [B].
    v: dx_t/dt at xt, [B, ...].
    cond: conditions of the network.
    sigma_d: standard deviation of the data.
    r: warm-up in [0, 1]; at r = 1 g is the true tangent (appendix D).
    s: time of the state that f returns, a scalar or [B], s <= t; 0 is the data. At
      s = t, g = v - sigma_d F, which is flow matching.

  Returns:
    F [B, ...], through which gradients flow, and g [B, ...], through which none flow.

  Raises:
    AssertionError: xt and v have different shapes.

  Example:
    >>> xt, t, v = jnp.ones((2, 3)), jnp.full(2, 0.5), jnp.zeros((2, 3))
    >>> F, g = tangent(lambda x, t, cond: x, xt, t, v, None, sigma_d=0.5)
    >>> F.shape, g.shape
    ((2, 3), (2, 3))
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
  """Returns the four terms of the tangent g = cos(t) df/dt, [B, ...] each.

  With f's df/dt = -cos(t) (sigma_d F - v) - sin(t) (x_t + sigma_d dF/dt) and dF/dt =
  grad_x F v / sigma_d + d_t F (arXiv:2410.11081, eq. 6 and section 4.1):

    "velocity"  -cos^2(t) (sigma_d F - v)
    "state"     -cos(t) sin(t) x_t
    "grad_x"    -cos(t) sin(t) grad_x F v
    "d_t"       -cos(t) sin(t) sigma_d d_t F

  The arguments are those of `tangent`, whose g is the sum of the terms. The two partial
  derivatives of the network cost one jvp each.

  Args:
    net: network with its parameters bound.
    xt: states, [B, ...].
    t: TrigFlow times, [B].
    v: dx_t/dt at xt, [B, ...].
    cond: conditions of the network.
    sigma_d: standard deviation of the data.

  Example:
    >>> xt, t, v = jnp.ones((2, 3)), jnp.full(2, 0.5), jnp.zeros((2, 3))
    >>> sorted(tangent_terms(lambda x, t, cond: x, xt, t, v, None, sigma_d=0.5))
    ['d_t', 'grad_x', 'state', 'velocity']
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


@registry.register(
  "losses",
  "scm",
  title=lambda fields: "sCT" if fields["velocity"] == "data" else "sCD",
  description=lambda fields: (
    "sCT is a consistency model trained on data."
    if fields["velocity"] == "data"
    else "sCD is a consistency model distilled from the teacher."
  ),
  family="consistency",
  needs_teacher=lambda fields: fields["velocity"] == "teacher",
)
def build(
  *,
  network: Network,
  sigma_d: Positive,
  teacher: TeacherFn | None = None,
  velocity: Velocity = "teacher",
  segment_boundaries: Annotated[
    tuple[float, ...], Range(above=0, below=np.pi / 2)
  ] = (),
  options: ConsistencyOptions = DEFAULT_OPTIONS,
) -> LossFn:
  """Returns E[e^w |F - F^- - g|^2 / D - w] with the normalized tangent g (eq. 8).

  Args:
    network: the network to train.
    sigma_d: standard deviation of the data.
    teacher: the teacher network; only velocity="teacher" uses it.
    velocity: "teacher" distills a teacher (sCD), "data" trains on data (sCT).
    segment_boundaries: times that divide [0, pi/2] into segments. f then returns the
      state at the lower end of the segment of t, and DDIM steps between the boundaries
      sample the model. () is the consistency model with one segment.
    options: times, normalization, warm-up, weight and guidance.

  Returns:
    A LossFn that logs "mse" and "tangent_norm".

  Raises:
    ValueError: the velocity is unknown, there is no teacher to distill, guidance is
      requested without one, or a boundary is outside (0, pi/2).

  Example:
    >>> network = Network(
    ...   init=lambda key: jnp.float32(0.5),
    ...   apply=lambda params, x, t, cond, *, key=None: params * x,
    ...   logvar=lambda params, t: params * t,
    ... )
    >>> loss = build(network=network, sigma_d=0.5, velocity="data")
    >>> batch = {"x0": jnp.ones((4, 2)), "cond": None}
    >>> key, step = jax.random.key(0), jnp.int32(0)
    >>> value, metrics = loss(network.init(key), batch, key, step, None)
    >>> sorted(metrics)
    ['mse', 'tangent_norm']
  """
  ends = np.asarray([0.0, *sorted(segment_boundaries)], np.float32)

  def time_sampler(key: PRNGKey, batch: int) -> Times:
    t = time_grids.log_normal(
      key, batch, p_mean=options.p_mean, p_std=options.p_std, sigma_d=sigma_d
    )
    s = jnp.asarray(ends)[jnp.searchsorted(ends, t, side="right") - 1]
    return Times(t, s, t - s)

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
