"""Regression of a network on the velocity of the data, for any distribution of t."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdiff_jax.diffusion import guidance, trigflow
from sdiff_jax.losses import _weighting
from sdiff_jax.types import Array, Batch, LossFn, Metrics, Network, Params, PRNGKey

# (key, B) -> TrigFlow times t [B].
TimeSampler = Callable[[PRNGKey, int], Array]


def velocity_matching(
  *,
  network: Network,
  sigma_d: float,
  time_sampler: TimeSampler,
  label_dropout: float,
  error_scale: Callable[[Array], Array] | None = None,
  adaptive_weight: bool = False,
) -> LossFn:
  """Returns E[e^w a(t)^2 |F(x_t / sigma_d, t) - v_t / sigma_d|^2 / D - w].

  Args:
    network: the network to train.
    sigma_d: standard deviation of the data.
    time_sampler: draws the times t of a batch.
    label_dropout: probability of training a sample without its label.
    error_scale: a(t), [B] -> [B]; None for 1.
    adaptive_weight: whether w = w_phi(t) is learned; otherwise w = 0.
  """

  def loss(
    params: Params, batch: Batch, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, Metrics]:
    del step, frozen
    x0 = batch["x0"]
    key_t, key_z, key_label, key_dropout = jax.random.split(key, 4)
    t = time_sampler(key_t, x0.shape[0])
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    cond = guidance.drop_labels(key_label, batch["cond"], label_dropout)
    xt = trigflow.perturb(x0, z, t)
    F = network.apply(params, xt / sigma_d, t, cond, key=key_dropout)
    error = F - trigflow.velocity(x0, z, t) / sigma_d
    if error_scale is not None:
      error *= trigflow.expand(error_scale(t), error)
    w = network.logvar(params, t) if adaptive_weight else None
    weighted, mse = _weighting.adaptive(error, w)
    return jnp.mean(weighted), {"mse": jnp.mean(mse)}

  return loss
