"""Variational score distillation of a few-step model, alone or beside sCD.

Adaptive VSD of arXiv:2410.11081, appendix C: samples of the student move along what a
teacher's and a fake network's velocities differ in, where the fake one is trained on
those samples at the same time.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.losses import _velocity, _weighting, scm
from sdiff_jax.types import Array, LossFn, Network, Params, PRNGKey


def init_extra_params(params: Params) -> Params:
  """Returns the parameters with those of the fake network, which start as they are."""
  return params | {"fake": jax.tree.map(jnp.copy, params)}


@registry.register("losses", "vsd", init_extra_params=init_extra_params)
def build(
  *,
  network: Network,
  teacher: Callable[..., Array],
  sigma_d: float,
  consistency: bool = True,
  p_mean: float = -1.0,
  p_std: float = 1.4,
  vsd_p_mean: float = 0.4,
  vsd_p_std: float = 2.0,
  fake_p_mean: float = -0.8,
  fake_p_std: float = 1.6,
  tangent_normalizer: str = "rms",
  c: float = 0.1,
  warmup_steps: int = 10_000,
  adaptive_weight: bool = True,
  guidance: tuple[float, ...] = (),
) -> LossFn:
  """Returns L_sCD + L_VSD + L_fake, each with gradients to its own network alone.

  With x0' = f(z', arctan(80 / sigma_d)) of the student,
    L_VSD  = E[e^w / D |x0' - x0'^- + F_teacher(x'_t) - F_fake(x'_t)|^2 - w],
    L_fake = E[|F_fake(x'_t) - v'_t / sigma_d|^2 / D].

  Args:
    network: the model to train; its parameters have been through `init_extra_params`.
    teacher: (frozen, x, t, cond) -> F of the teacher.
    sigma_d: standard deviation of the data.
    consistency: whether L_sCD is part of it; otherwise VSD alone.
    p_mean: mean of ln(sigma_d tan t) of L_sCD.
    p_std: its standard deviation.
    vsd_p_mean: mean of L_VSD's.
    vsd_p_std: its standard deviation.
    fake_p_mean: mean of L_fake's.
    fake_p_std: its standard deviation.
    tangent_normalizer: of L_sCD, see `scm`; so are the others.
    c: constant of the normalisation.
    warmup_steps: steps over which r rises from 0 to 1.
    adaptive_weight: learn w_phi(t) of L_sCD and w of L_VSD; otherwise w = 0.
    guidance: (low, high) scales of classifier-free guidance to distil, () for none.

  Raises:
    ValueError: an unknown tangent_normalizer.
  """
  distil = scm.build(
    network=network,
    teacher=teacher,
    sigma_d=sigma_d,
    p_mean=p_mean,
    p_std=p_std,
    tangent_normalizer=tangent_normalizer,
    c=c,
    warmup_steps=warmup_steps,
    adaptive_weight=adaptive_weight,
    guidance=guidance,
  )
  guidance = tuple(guidance)
  velocity_of = _velocity.velocity_target("teacher", teacher, sigma_d=sigma_d)
  noisy = functools.partial(_noisy, sigma_d=sigma_d)

  def loss(
    params: Params, batch: dict, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, dict[str, Array]]:
    key_scd, key_s, key_start, key_net, key_vsd, key_fake = jax.random.split(key, 6)
    start = jnp.full(len(batch["x0"]), jnp.arctan(time_grids.SIGMA_MAX / sigma_d))
    cond = _velocity.sample_guidance_scale(key_s, start, batch["cond"], guidance)
    z = sigma_d * jax.random.normal(key_start, batch["x0"].shape, jnp.float32)
    F = network.apply(params, z / sigma_d, start, cond, key=key_net)
    made = trigflow.denoise(z, F, start, sigma_d)
    fixed = jax.lax.stop_gradient(made)
    fake = params["fake"]

    z, t, xt = noisy(key_fake, fixed, fake_p_mean, fake_p_std)
    F = network.apply(fake, xt / sigma_d, t, cond, key=jax.random.fold_in(key_fake, 1))
    error = F - trigflow.velocity(fixed, z, t) / sigma_d
    of_fake = jnp.mean(jnp.square(error))

    _, t, xt = noisy(key_vsd, fixed, vsd_p_mean, vsd_p_std)
    theirs = velocity_of(frozen, None, None, xt, t, cond) / sigma_d
    ours = network.apply(fake, xt / sigma_d, t, cond)
    w = network.logvar(fake, t) if adaptive_weight else None
    residual = made - fixed + jax.lax.stop_gradient(theirs - ours)
    weighted, mse = _weighting.adaptive(residual, w)
    aux = {"vsd_mse": jnp.mean(mse), "fake_mse": of_fake}
    total = jnp.mean(weighted) + of_fake
    if consistency:
      of_scm, more = distil(params, batch, key_scd, step, frozen)
      total, aux = total + of_scm, aux | more
    return total, aux

  return loss


def _noisy(
  key: PRNGKey, x0: Array, p_mean: float, p_std: float, *, sigma_d: float
) -> tuple[Array, Array, Array]:
  """Returns z, t and x_t."""
  key_t, key_z = jax.random.split(key)
  t = time_grids.log_normal(key_t, len(x0), p_mean=p_mean, p_std=p_std, sigma_d=sigma_d)
  z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
  return z, t, trigflow.perturb(x0, z, t)
