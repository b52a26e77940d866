"""The objective of DDPM: the noise at discrete timesteps (arXiv:2006.11239, eq. 14)."""

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import guidance, noise_schedules, trigflow
from sdiff_jax.losses import _weighting
from sdiff_jax.types import Array, LossFn, Network, Params, PRNGKey


@registry.register("losses", "ddpm")
def build(
  *,
  network: Network,
  sigma_d: float,
  schedule: str = "cosine",
  timesteps: int = 100,
  label_dropout: float = 0.0,
) -> LossFn:
  """Returns E |eps - eps_hat|^2 / D over timesteps n = 0, ..., T - 1, all alike.

  In TrigFlow's terms eps = z / sigma_d and eps_hat = sin t x_t / sigma_d + cos t F, so
  it is E cos^2(t) |F - v / sigma_d|^2 / D, with tan t = sigma_n / (alpha_n sigma_d):
  whatever the network predicts, F is its exact change of variables.

  Args:
    network: the model to train.
    sigma_d: standard deviation of the data.
    schedule: of the betas (see `paths.alphas_cumprod`).
    timesteps: T.
    label_dropout: share of samples trained without their label, for guidance.
  """
  abar = noise_schedules.alphas_cumprod(schedule, timesteps)
  angles = trigflow.angle(abar**0.5, (1 - abar) ** 0.5, sigma_d)

  def loss(
    params: Params, batch: dict, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, dict[str, Array]]:
    del step, frozen
    x0 = batch["x0"]
    key_t, key_z, key_label, key_dropout = jax.random.split(key, 4)
    n = jax.random.randint(key_t, x0.shape[:1], 0, timesteps)
    t = jnp.asarray(angles, jnp.float32)[n]
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    cond = guidance.drop_labels(key_label, batch["cond"], label_dropout)
    xt = trigflow.perturb(x0, z, t)
    F = network.apply(params, xt / sigma_d, t, cond, key=key_dropout)
    error = F - trigflow.velocity(x0, z, t) / sigma_d
    error *= trigflow.expand(jnp.cos(t), error)
    value, mse = _weighting.adaptive(error, None)
    return jnp.mean(value), {"mse": jnp.mean(mse)}

  return loss
