"""Flow-anchored consistency models: one network for the velocity and the shortcut.

FACM (arXiv:2507.03738) trains the consistency objective of rectified flow beside flow
matching, on the same states and in the same network, which so keeps the velocity field
that the tangent follows. Which of the two the network is asked for, its end time tells: 0
for the shortcut, t for the velocity (the paper's auxiliary time; its other form, an
expanded interval of times 2 - t, is left out, since the weights of a teacher start at t).
The cosine is over all numbers of a sample, and not over the channels of each pixel.
"""

import functools

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import guidance as cfg
from sdiff_jax.diffusion import rectified_flow, time_grids, trigflow
from sdiff_jax.fields import LogMean, NotNegative, Positive
from sdiff_jax.losses import _velocity
from sdiff_jax.losses._velocity import GuidanceRange, TeacherFn, Velocity
from sdiff_jax.losses.meanflow import average_velocity_target
from sdiff_jax.types import (
  Array,
  Batch,
  CondSpec,
  LossFn,
  Metrics,
  Network,
  Params,
  PRNGKey,
)


def anchor_loss(prediction: Array, target: Array) -> Array:
  """Returns |prediction - target|^2 / D + 1 - cos(prediction, target), [B].

  Args:
    prediction: velocities of the network, [B, ...].
    target: velocities of the data or of a teacher, [B, ...].

  Example:
    >>> f"{anchor_loss(jnp.ones((1, 2)), -jnp.ones((1, 2)))[0]:.3f}"
    '6.000'
  """
  axes = tuple(range(1, prediction.ndim))
  mse = jnp.mean(jnp.square(prediction - target), axes)
  product = jnp.sum(prediction * target, axes)
  squares = jnp.sum(jnp.square(prediction), axes) * jnp.sum(jnp.square(target), axes)
  return mse + 1 - product * jax.lax.rsqrt(squares + 1e-12)


def shortcut_loss(
  u: Array, target: Array, tau: Array, *, power: float, weight_power: float, c: float
) -> Array:
  """Returns sin(pi tau / 2) e / (e + c)^q with e = |u - u^- + alpha g|^2 / D, [B].

  g = u^- - target is clipped to [-1, 1], and alpha = 1 - (1 - tau)^power.

  Args:
    u: average velocities from tau to 0, [B, ...].
    target: their targets v - tau du/dtau, [B, ...], without gradients.
    tau: times of rectified flow, [B].
    power: exponent of the relaxation alpha.
    weight_power: exponent q of the weight.
    c: constant of the weight.

  Example:
    >>> options = {"power": 0.5, "weight_power": 0.0, "c": 1e-3}
    >>> shortcut_loss(jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.ones(1), **options).tolist()
    [1.0]
  """
  constant = jax.lax.stop_gradient(u)
  g = jnp.clip(constant - target, -1, 1)
  alpha = trigflow.expand(1 - (1 - tau) ** power, u)
  axes = tuple(range(1, u.ndim))
  error = jnp.mean(jnp.square(u - constant + alpha * g), axes)
  weight = (jax.lax.stop_gradient(error) + c) ** -weight_power
  return jnp.sin(jnp.pi * tau / 2) * weight * error


@registry.register(
  "losses",
  "facm",
  title="FACM",
  description="FACM is a consistency model that also keeps the velocity of the data.",
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
  p_mean: LogMean = -1.0,
  p_std: Positive = 1.4,
  power: Positive = 0.5,
  weight_power: NotNegative = 0.5,
  c: Positive = 0.001,
  guidance: GuidanceRange = (),
) -> LossFn:
  """Returns the sum of `anchor_loss` and `shortcut_loss`, in units of sigma_d.

  With rectified flow's states x at times tau, the first is that of u(x, tau, tau) and the
  velocity v, the second that of u(x, tau, 0) and v - tau du/dtau.

  Args:
    network: the network to train, with the condition "end_time".
    sigma_d: standard deviation of the data.
    teacher: the teacher network; only velocity="teacher" uses it.
    velocity: "teacher" distills a teacher, "data" trains on data.
    p_mean: mean of ln(sigma_d tan t) in training.
    p_std: standard deviation of ln(sigma_d tan t) in training.
    power: exponent of the relaxation of the tangent, see `shortcut_loss`.
    weight_power: exponent of the weight of the shortcut.
    c: constant of the weight of the shortcut.
    guidance: (low, high) scales of classifier-free guidance to distill, () for none.

  Returns:
    A LossFn that logs "mse", of the shortcut's target, and "anchor".

  Raises:
    ValueError: there is no teacher to distill, or guidance is requested without one.

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
    ((), ['anchor', 'mse'])
  """
  _velocity.check_guidance(guidance)
  velocity_of = _velocity.build(velocity, teacher, sigma_d=sigma_d, guidance=guidance)

  def loss(
    params: Params, batch: Batch, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, Metrics]:
    del step
    x0 = batch["x0"]
    key_t, key_z, key_v, key_dropout = jax.random.split(key, 4)
    t = time_grids.log_normal(
      key_t, x0.shape[0], p_mean=p_mean, p_std=p_std, sigma_d=sigma_d
    )
    tau = rectified_flow.time(t)
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    cond = cfg.sample_scale(key_v, t, batch["cond"], tuple(guidance))
    x = rectified_flow.perturb(x0, z, tau)
    xt = rectified_flow.to_trigflow(x, tau)
    v = rectified_flow.velocity(velocity_of(frozen, x0, z, xt, t, cond), x, tau)
    net = functools.partial(network.apply, params, key=key_dropout)
    average = rectified_flow.average_velocity(net, sigma_d)
    anchor = anchor_loss(average(x, tau, tau, cond) / sigma_d, v / sigma_d)
    u, target = average_velocity_target(
      average, x, tau, jnp.zeros_like(tau), v, v, cond
    )
    u, target = u / sigma_d, target / sigma_d
    shortcut = shortcut_loss(
      u, target, tau, power=power, weight_power=weight_power, c=c
    )
    aux = {"mse": jnp.mean(jnp.square(u - target)), "anchor": jnp.mean(anchor)}
    return jnp.mean(anchor + shortcut), aux

  return loss
