"""Variational score distillation of a few-step model, alone or together with sCD.

Adaptive VSD of arXiv:2410.11081, appendix C: samples of the student move along the
difference between the velocities of a teacher and of a fake network, which is trained
on these samples at the same time.
"""

import functools

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import guidance as cfg
from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.fields import LogMean, Positive
from sdiff_jax.losses import _velocity, _weighting, scm
from sdiff_jax.losses._tangent import DEFAULT_OPTIONS, ConsistencyOptions
from sdiff_jax.losses._velocity import TeacherFn
from sdiff_jax.types import Array, Batch, LossFn, Metrics, Network, Params, PRNGKey


def init_extra_params(params: Params) -> Params:
  """Returns the parameters with those of the fake network, which starts as a copy.

  Args:
    params: parameters of the student, {"net": ..., "logvar": ...}.

  Example:
    >>> sorted(init_extra_params({"net": 1.0, "logvar": 0.0}))
    ['fake', 'logvar', 'net']
  """
  return params | {"fake": jax.tree.map(jnp.copy, params)}


@registry.register(
  "losses",
  "vsd",
  title=lambda fields: "sCD + VSD" if fields["consistency"] else "VSD",
  family="consistency",
  needs_teacher=True,
  init_extra_params=init_extra_params,
)
def build(
  *,
  network: Network,
  sigma_d: Positive,
  teacher: TeacherFn,
  consistency: bool = True,
  vsd_p_mean: LogMean = 0.4,
  vsd_p_std: Positive = 2.0,
  fake_p_mean: LogMean = -0.8,
  fake_p_std: Positive = 1.6,
  options: ConsistencyOptions = DEFAULT_OPTIONS,
) -> LossFn:
  """Returns L_sCD + L_VSD + L_fake; each has gradients of its own network alone.

  With samples x0' = f(z', arctan(80 / sigma_d)) of the student,
    L_VSD  = E[e^w / D |x0' - x0'^- + F_teacher(x'_t) - F_fake(x'_t)|^2 - w],
    L_fake = E[|F_fake(x'_t) - v'_t / sigma_d|^2 / D].

  Args:
    network: the network to train; its parameters are those of `init_extra_params`.
    sigma_d: standard deviation of the data.
    teacher: the teacher network.
    consistency: whether L_sCD is added; otherwise the loss is VSD alone.
    vsd_p_mean: mean of ln(sigma_d tan t) in L_VSD.
    vsd_p_std: standard deviation of ln(sigma_d tan t) in L_VSD.
    fake_p_mean: mean of ln(sigma_d tan t) in L_fake.
    fake_p_std: standard deviation of ln(sigma_d tan t) in L_fake.
    options: those of L_sCD; L_VSD shares its weight and guidance.

  Returns:
    A LossFn that logs "vsd_mse", "fake_mse" and the metrics of L_sCD.

  Example:
    >>> import jax
    >>> network = Network(
    ...   init=lambda key: {"net": jnp.float32(0.5), "logvar": jnp.float32(0.0)},
    ...   apply=lambda params, x, t, cond, *, key=None: params["net"] * x,
    ...   logvar=lambda params, t: params["logvar"] * t,
    ... )
    >>> loss = build(network=network, sigma_d=0.5, teacher=network.apply)
    >>> batch = {"x0": jnp.ones((4, 2)), "cond": None}
    >>> key, step = jax.random.key(0), jnp.int32(0)
    >>> params = network.init(key)
    >>> value, metrics = loss(init_extra_params(params), batch, key, step, params)
    >>> value.shape, "vsd_mse" in metrics
    ((), True)
  """
  distill = scm.build(
    network=network, sigma_d=sigma_d, teacher=teacher, options=options
  )
  velocity_of = _velocity.ode_field(teacher, sigma_d=sigma_d)
  noisy = functools.partial(_noisy, sigma_d=sigma_d)

  def loss(
    params: Params, batch: Batch, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, Metrics]:
    key_scd, key_s, key_start, key_net, key_vsd, key_fake = jax.random.split(key, 6)
    start = jnp.full(len(batch["x0"]), jnp.arctan(time_grids.SIGMA_MAX / sigma_d))
    cond = cfg.sample_scale(key_s, start, batch["cond"], options.guidance)
    z = sigma_d * jax.random.normal(key_start, batch["x0"].shape, jnp.float32)
    F = network.apply(params, z / sigma_d, start, cond, key=key_net)
    sample = trigflow.denoise(z, F, start, sigma_d)
    constant_sample = jax.lax.stop_gradient(sample)
    fake = params["fake"]

    z, t, xt = noisy(key_fake, constant_sample, fake_p_mean, fake_p_std)
    F = network.apply(fake, xt / sigma_d, t, cond, key=jax.random.fold_in(key_fake, 1))
    error = F - trigflow.velocity(constant_sample, z, t) / sigma_d
    fake_loss = jnp.mean(jnp.square(error))

    z, t, xt = noisy(key_vsd, constant_sample, vsd_p_mean, vsd_p_std)
    teacher_F = velocity_of(frozen, constant_sample, z, xt, t, cond) / sigma_d
    fake_F = network.apply(fake, xt / sigma_d, t, cond)
    w = network.logvar(fake, t) if options.adaptive_weight else None
    residual = sample - constant_sample + jax.lax.stop_gradient(teacher_F - fake_F)
    weighted, mse = _weighting.adaptive(residual, w)
    aux = {"vsd_mse": jnp.mean(mse), "fake_mse": fake_loss}
    total = jnp.mean(weighted) + fake_loss
    if consistency:
      scm_loss, scm_metrics = distill(params, batch, key_scd, step, frozen)
      total, aux = total + scm_loss, aux | scm_metrics
    return total, aux

  return loss


def _noisy(
  key: PRNGKey, x0: Array, p_mean: float, p_std: float, *, sigma_d: float
) -> tuple[Array, Array, Array]:
  """Returns noise z, times t and states x_t of a batch x0."""
  key_t, key_z = jax.random.split(key)
  t = time_grids.log_normal(key_t, len(x0), p_mean=p_mean, p_std=p_std, sigma_d=sigma_d)
  z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
  return z, t, trigflow.perturb(x0, z, t)
