"""rCM: a continuous-time consistency model, regularized by score distillation.

rCM (arXiv:2510.08431) adds DMD2's loss to sCD: samples of the student, made in 1 to 4 of
its own steps, move along the difference of two denoisers, of the teacher and of a critic
that is trained on these samples. The student is trained in every fifth step, the critic
in the others. Of the paper, the finite difference in place of a part of the tangent, the
adversarial loss and everything of video models are left out.

The network whose turn it is not has gradients of 0. It stays as it is with an optimizer
without momentum, `optim.b1=0`, which is the paper's. Counted operations of a step are
those of the student's, 1.6 times the average with the defaults.
"""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import guidance as cfg
from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.fields import Count, LogMean, NotNegative, Positive, Range
from sdiff_jax.losses import _velocity, scm
from sdiff_jax.losses._tangent import DEFAULT_OPTIONS, ConsistencyOptions
from sdiff_jax.losses._velocity import TeacherFn
from sdiff_jax.losses.vsd import init_extra_params
from sdiff_jax.types import (
  Array,
  Batch,
  Cond,
  LossFn,
  Metrics,
  NetFn,
  Network,
  Params,
  PRNGKey,
)


def rollout(
  net: NetFn,
  key: PRNGKey,
  times: Array,
  steps: Array,
  cond: Cond,
  like: Array,
  *,
  sigma_d: float,
) -> Array:
  """Returns samples of the student, [B, ...]; gradients flow through their last steps.

  Each step jumps to data, x0 = f(x, t_n), and adds noise of the next time, as the sampler
  of consistency models does.

  Args:
    net: the student with its parameters bound.
    key: random key.
    times: t_1, ..., t_N of each sample, descending, [N, B].
    steps: number of steps of each sample, int in 1 to N, [B].
    cond: conditions, leading [B].
    like: an array of the shape of the samples, [B, ...].
    sigma_d: standard deviation of the data.

  Example:
    >>> net = lambda x, t, cond: 0 * x
    >>> steps, times = jnp.array([1, 2]), jnp.array([[1.5, 1.5], [0.7, 0.7]])
    >>> key = jax.random.key(0)
    >>> rollout(net, key, times, steps, None, jnp.ones((2, 3)), sigma_d=0.5).shape
    (2, 3)
  """

  def noise(n: int) -> Array:
    return sigma_d * jax.random.normal(
      jax.random.fold_in(key, n), like.shape, like.dtype
    )

  # A sample of fewer steps than N begins later in the loop, with its first time.
  last = len(times) - 1
  first = last + 1 - steps
  x, t = noise(0), times[0]
  for n in range(last):
    F = net(x / sigma_d, t, cond)
    next_t = jnp.take_along_axis(times, jnp.maximum(n + 1 - first, 0)[None], axis=0)[0]
    x0 = jax.lax.stop_gradient(trigflow.denoise(x, F, t, sigma_d))
    begun = first <= n
    noised = trigflow.perturb(x0, noise(n + 1), next_t)
    x = jnp.where(trigflow.expand(begun, x), noised, x)
    t = jnp.where(begun, next_t, t)
  return trigflow.denoise(x, net(x / sigma_d, t, cond), t, sigma_d)


def matching_direction(x0: Array, d_fake: Array, d_teacher: Array) -> Array:
  """Returns (D_fake - D_teacher) / mean |x0 - D_teacher|, by which x0 is too far.

  Args:
    x0: samples of the student, [B, ...].
    d_fake: the critic's denoised value of the noised samples, [B, ...].
    d_teacher: the teacher's, [B, ...].

  Example:
    >>> x0, fake, real = jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.zeros((1, 2))
    >>> matching_direction(x0, fake, real).tolist()
    [[1.0, 1.0]]
  """
  axes = tuple(range(1, x0.ndim))
  scale = jnp.mean(jnp.abs(x0 - d_teacher), axes, keepdims=True)
  return (d_fake - d_teacher) / jnp.maximum(scale, jnp.finfo(x0.dtype).eps)


@registry.register(
  "losses",
  "rcm",
  title="rCM",
  description="rCM is a consistency model whose samples are matched to its teacher's.",
  family="consistency",
  needs_teacher=True,
  init_extra_params=init_extra_params,
)
def build(
  *,
  network: Network,
  sigma_d: Positive,
  teacher: TeacherFn,
  matching_weight: NotNegative = 0.01,
  student_every: Count = 5,
  rollout_steps: Annotated[int, Range(1, 16)] = 4,
  rollout_p_mean: LogMean = -0.8,
  rollout_p_std: Positive = 1.6,
  matching_p_mean: LogMean = 0.0,
  matching_p_std: Positive = 1.6,
  fake_p_mean: LogMean = -0.8,
  fake_p_std: Positive = 1.6,
  options: ConsistencyOptions = DEFAULT_OPTIONS,
) -> LossFn:
  """Returns L_sCD + lambda L_DMD in every fifth step, and L_fake in the others.

  With samples x0' of `rollout`, noised to x'_t, and g of `matching_direction`,
    L_DMD  = E[|x0' - (x0' - g)^-|^2 / D],
    L_fake = E[|F_fake(x'_t) - v'_t / sigma_d|^2 / D].
  The rollout has 1 to `rollout_steps` steps, each as probable; its first time is
  arctan(80 / sigma_d), and each further time the smaller of a random one and that before.

  Args:
    network: the network to train; its parameters are those of `init_extra_params`.
    sigma_d: standard deviation of the data.
    teacher: the teacher network.
    matching_weight: lambda.
    student_every: steps of training between two of the student.
    rollout_steps: largest number of steps of the samples.
    rollout_p_mean: mean of ln(sigma_d tan t) of the times of the rollout.
    rollout_p_std: its standard deviation.
    matching_p_mean: mean of ln(sigma_d tan t) in L_DMD.
    matching_p_std: its standard deviation.
    fake_p_mean: mean of ln(sigma_d tan t) in L_fake.
    fake_p_std: its standard deviation.
    options: those of L_sCD.

  Returns:
    A LossFn that logs "matching" (L_DMD), "fake_mse" and the metrics of L_sCD, each 0 in
    the steps of the other network.

  Example:
    >>> network = Network(
    ...   init=lambda key: {"net": jnp.float32(0.5), "logvar": jnp.float32(0.0)},
    ...   apply=lambda params, x, t, cond, *, key=None: params["net"] * x,
    ...   logvar=lambda params, t: params["logvar"] * t,
    ... )
    >>> loss = build(network=network, sigma_d=0.5, teacher=network.apply)
    >>> batch = {"x0": jnp.ones((4, 2)), "cond": None}
    >>> key, step, params = jax.random.key(0), jnp.int32(0), network.init(None)
    >>> value, metrics = loss(init_extra_params(params), batch, key, step, params)
    >>> sorted(metrics)
    ['fake_mse', 'matching', 'mse', 'tangent_norm']
  """
  distill = scm.build(
    network=network, sigma_d=sigma_d, teacher=teacher, options=options
  )
  velocity_of = _velocity.ode_field(teacher, sigma_d=sigma_d)
  draw = functools.partial(time_grids.log_normal, sigma_d=sigma_d)

  def samples(params: Params, batch: Batch, key: PRNGKey) -> tuple[Array, Cond]:
    key_t, key_n, key_s, key_x, key_net = jax.random.split(key, 5)
    count = len(batch["x0"])
    start = jnp.full((1, count), jnp.arctan(time_grids.SIGMA_MAX / sigma_d))
    later = draw(
      key_t, count * rollout_steps, p_mean=rollout_p_mean, p_std=rollout_p_std
    ).reshape(rollout_steps, count)[1:]
    times = jax.lax.cummin(jnp.concatenate([start.astype(later.dtype), later]), axis=0)
    steps = jax.random.randint(key_n, (count,), 1, rollout_steps + 1)
    cond = cfg.sample_scale(key_s, times[0], batch["cond"], options.guidance)
    net = functools.partial(network.apply, params, key=key_net)
    x0 = rollout(net, key_x, times, steps, cond, batch["x0"], sigma_d=sigma_d)
    return x0, cond

  def noised(key: PRNGKey, x0: Array, p_mean: float, p_std: float) -> tuple[Array, ...]:
    key_t, key_z = jax.random.split(key)
    t = draw(key_t, len(x0), p_mean=p_mean, p_std=p_std)
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    return z, t, trigflow.perturb(x0, z, t)

  def of_student(
    params: Params, batch: Batch, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, Metrics]:
    key_scm, key_x, key_t = jax.random.split(key, 3)
    consistency, aux = distill(params, batch, key_scm, step, frozen)
    x0, cond = samples(params, batch, key_x)
    constant = jax.lax.stop_gradient(x0)
    z, t, xt = noised(key_t, constant, matching_p_mean, matching_p_std)
    F_teacher = velocity_of(frozen, constant, z, xt, t, cond) / sigma_d
    F_fake = network.apply(params["fake"], xt / sigma_d, t, cond)
    d_fake, d_teacher = (
      trigflow.denoise(xt, F, t, sigma_d) for F in (F_fake, F_teacher)
    )
    g = matching_direction(constant, d_fake, d_teacher)
    matching = jnp.mean(jnp.square(x0 - jax.lax.stop_gradient(constant - g)))
    zero = jnp.zeros_like(matching)
    aux = aux | {"matching": matching, "fake_mse": zero}
    return consistency + matching_weight * matching, aux

  def of_critic(
    params: Params, batch: Batch, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, Metrics]:
    del step, frozen
    key_x, key_t, key_net = jax.random.split(key, 3)
    x0, cond = samples(params, batch, key_x)
    x0 = jax.lax.stop_gradient(x0)
    z, t, xt = noised(key_t, x0, fake_p_mean, fake_p_std)
    F = network.apply(params["fake"], xt / sigma_d, t, cond, key=key_net)
    fake = jnp.mean(jnp.square(F - trigflow.velocity(x0, z, t) / sigma_d))
    zero = jnp.zeros_like(fake)
    return fake, {
      **dict.fromkeys(("mse", "tangent_norm", "matching"), zero),
      "fake_mse": fake,
    }

  def loss(
    params: Params, batch: Batch, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, Metrics]:
    is_student = step % student_every == 0
    return jax.lax.cond(
      is_student, of_student, of_critic, params, batch, key, step, frozen
    )

  return loss
