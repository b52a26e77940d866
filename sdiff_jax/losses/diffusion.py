"""The TrigFlow diffusion objective: regression on the velocity."""

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import guidance, time_grids, trigflow
from sdiff_jax.losses import _weighting
from sdiff_jax.types import Array, LossFn, Network, Params, PRNGKey


@registry.register("losses", "diffusion")
def build(
  *,
  network: Network,
  sigma_d: float,
  p_mean: float = -1.2,
  p_std: float = 1.2,
  label_dropout: float = 0.1,
  adaptive_weight: bool = True,
) -> LossFn:
  """Returns E[e^w |F(x_t/sigma_d, t) - v_t/sigma_d|^2 / D - w], w = w_phi(t).

  Args:
    network: the model to train.
    sigma_d: standard deviation of the data.
    p_mean: mean of ln(sigma_d tan t) over training.
    p_std: its standard deviation.
    label_dropout: share of samples trained without their label, for guidance.
    adaptive_weight: learn w_phi(t); otherwise w = 0.

  Returns:
    A LossFn (arXiv:2410.11081, section 3 and eq. 8 with v in place of the tangent).
  """

  def loss(
    params: Params, batch: dict, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, dict[str, Array]]:
    del step, frozen
    x0 = batch["x0"]
    key_t, key_z, key_label, key_dropout = jax.random.split(key, 4)
    t = time_grids.log_normal(
      key_t, x0.shape[0], p_mean=p_mean, p_std=p_std, sigma_d=sigma_d
    )
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    cond = guidance.drop_labels(key_label, batch["cond"], label_dropout)
    xt = trigflow.perturb(x0, z, t)
    F = network.apply(params, xt / sigma_d, t, cond, key=key_dropout)
    error = F - trigflow.velocity(x0, z, t) / sigma_d
    w = network.logvar(params, t) if adaptive_weight else None
    weighted, mse = _weighting.adaptive(error, w)
    return jnp.mean(weighted), {"mse": jnp.mean(mse)}

  return loss
