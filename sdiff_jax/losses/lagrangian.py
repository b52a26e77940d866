"""Lagrangian distillation of a flow map, from a teacher or from itself (LSD).

The state X_{t,s} to which a flow map moves x_t obeys d/ds X_{t,s} = v(X_{t,s}, s). The loss
is the residual of this equation (arXiv:2406.07507; arXiv:2505.18825, section 3). The
velocity v is that of a teacher, or (self-distillation) the map's own at equal times,
v(x, s) = sigma_d F(x / sigma_d, s, s), which other samples fit to the data.

The average of the parameters as the self-distilled velocity, and the loss on pairs of
steps (PSD), which the paper has beside it, are left out.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import guidance as cfg
from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.fields import Fraction, LogMean, Positive
from sdiff_jax.losses import _velocity, _weighting, flow_map
from sdiff_jax.losses._velocity import GuidanceRange, TeacherFn, Velocity
from sdiff_jax.types import (
  Array,
  Batch,
  Cond,
  CondSpec,
  LossFn,
  Metrics,
  NetFn,
  Network,
  Params,
  PRNGKey,
)


def residual(
  net: NetFn,
  xt: Array,
  t: Array,
  s: Array,
  velocity: Callable[[Array], Array],
  cond: Cond,
  *,
  sigma_d: float,
) -> Array:
  """Returns d/ds X_{t,s}(x_t) - v(X_{t,s}(x_t), s), [B, ...].

  X_{t,s} = cos(t - s) x_t - sin(t - s) sigma_d F(x_t / sigma_d, t, s), and its derivative
  comes from one jvp in s. Gradients flow through this derivative alone: the velocity and
  the state at which it is evaluated are constants (arXiv:2505.18825, section 3.3).

  Args:
    net: network with its parameters bound, which takes the condition "end_time".
    xt: states, [B, ...].
    t: TrigFlow times, [B].
    s: end times, [B], s <= t.
    velocity: (state [B, ...] at time s) -> dx/ds.
    cond: the other conditions of the network.
    sigma_d: standard deviation of the data.

  Example:
    >>> xt, t = jnp.ones((1, 2)), jnp.ones(1)
    >>> net = lambda x, t, cond: 0 * x
    >>> residual(net, xt, t, t, lambda x: 3 * x, None, sigma_d=0.5).tolist()
    [[-3.0, -3.0]]
  """

  def state(s: Array) -> Array:
    F = net(xt / sigma_d, t, trigflow.with_end_time(cond, s))
    return trigflow.rotate(xt, F, t, s, sigma_d)

  x_s, slope = jax.jvp(state, (s,), (jnp.ones_like(s),))
  return slope - jax.lax.stop_gradient(velocity(jax.lax.stop_gradient(x_s)))


@registry.register(
  "losses",
  "lagrangian",
  title=lambda fields: "LMD" if fields["velocity"] == "teacher" else "LSD",
  description="The flow map moves along the velocity at the states that it reaches.",
  family="consistency",
  needs_teacher=lambda fields: fields["velocity"] == "teacher",
  cond={trigflow.END_TIME: CondSpec((), "float32")},
)
def build(
  *,
  network: Network,
  sigma_d: Positive,
  teacher: TeacherFn | None = None,
  velocity: Velocity = "teacher",
  diffusion_fraction: Fraction = 0.5,
  consistency_fraction: Fraction = 0.0,
  p_mean: LogMean = -1.0,
  p_std: Positive = 1.4,
  adaptive_weight: bool = False,
  guidance: GuidanceRange = (),
) -> LossFn:
  """Returns E[e^w |d/ds X_{t,s} - v(X_{t,s}, s)|^2 / (sigma_d^2 D) - w].

  Where s = t the residual is sigma_d F(x_t / sigma_d, t, t) - v(x_t, t), in which v is the
  velocity of the teacher or of the data. The network differentiates itself in s, and
  gradients flow through that derivative, so a step costs more than one of `flow_map`.

  Args:
    network: the network to train, with the condition "end_time".
    sigma_d: standard deviation of the data.
    teacher: the teacher network; only velocity="teacher" uses it.
    velocity: "teacher" distills a teacher (LMD), "data" distills the network's own velocity,
      which the samples with s = t fit to the data (LSD).
    diffusion_fraction: fraction of the samples with s = t.
    consistency_fraction: fraction of the samples with s = 0; s is uniform in [0, t] in
      the rest.
    p_mean: mean of ln(sigma_d tan t) in training.
    p_std: standard deviation of ln(sigma_d tan t) in training.
    adaptive_weight: whether w_phi(t) is learned; otherwise w = 0.
    guidance: (low, high) scales of classifier-free guidance to distill, () for none.

  Returns:
    A LossFn that logs "mse".

  Raises:
    ValueError: there is no teacher to distill, guidance is requested without one, the
      fractions sum to more than 1, or the network would distill a velocity that it does
      not learn.

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
    >>> value.shape, sorted(metrics)
    ((), ['mse'])
  """
  flow_map.check_fractions(diffusion_fraction, consistency_fraction)
  if velocity == "data" and diffusion_fraction == 0:
    raise ValueError(
      "diffusion_fraction=0: must be above 0 with velocity='data', since only these "
      "samples fit the velocity to the data"
    )
  _velocity.check_guidance(guidance)
  velocity_of = _velocity.build(velocity, teacher, sigma_d=sigma_d, guidance=guidance)

  def loss(
    params: Params, batch: Batch, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, Metrics]:
    del step
    x0 = batch["x0"]
    key_t, key_s, key_z, key_v, key_dropout = jax.random.split(key, 5)
    t = time_grids.log_normal(
      key_t, x0.shape[0], p_mean=p_mean, p_std=p_std, sigma_d=sigma_d
    )
    s = flow_map.end_times(key_s, t, diffusion_fraction, consistency_fraction)
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    xt = trigflow.perturb(x0, z, t)
    cond = cfg.sample_scale(key_v, t, batch["cond"], tuple(guidance))
    net = functools.partial(network.apply, params, key=key_dropout)

    def velocity_at(x: Array) -> Array:
      if velocity == "teacher":
        return velocity_of(frozen, x0, z, x, s, cond)
      own = sigma_d * net(x / sigma_d, s, trigflow.with_end_time(cond, s))
      of_data = velocity_of(frozen, x0, z, xt, t, cond)
      return jnp.where(trigflow.expand(s == t, x), of_data, own)

    error = residual(net, xt, t, s, velocity_at, cond, sigma_d=sigma_d) / sigma_d
    w = network.logvar(params, t) if adaptive_weight else None
    weighted, mse = _weighting.adaptive(error, w)
    return jnp.mean(weighted), {"mse": jnp.mean(mse)}

  return loss
