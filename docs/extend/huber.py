"""A loss: TrigFlow diffusion with the pseudo-Huber distance instead of the square."""

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids, trigflow


@registry.register("losses", "huber", title="Huber teacher", family="diffusion")
def build(*, network, sigma_d, p_mean=-1.2, p_std=1.2, c=0.03):
  """Returns E[(|F(x_t / sigma_d, t) - v_t / sigma_d|^2 / D + c^2)^(1/2) - c].

  Args:
    network: the network to train, supplied by the caller.
    sigma_d: standard deviation of the data, supplied by the caller.
    p_mean: mean of ln(sigma_d tan t); from here on the config's fields.
    p_std: standard deviation of ln(sigma_d tan t).
    c: where the distance changes from quadratic to linear.
  """

  def loss(params, batch, key, step, frozen):
    del step, frozen  # neither a warm-up nor a teacher
    x0 = batch["x0"]
    key_t, key_z, key_dropout = jax.random.split(key, 3)
    t = time_grids.log_normal(
      key_t, len(x0), p_mean=p_mean, p_std=p_std, sigma_d=sigma_d
    )
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    xt = trigflow.perturb(x0, z, t)
    F = network.apply(params, xt / sigma_d, t, batch["cond"], key=key_dropout)
    error = F - trigflow.velocity(x0, z, t) / sigma_d
    squares = jnp.mean(jnp.square(error), range(1, error.ndim))
    huber = jnp.mean(jnp.sqrt(squares + c**2) - c)
    return huber, {"mse": jnp.mean(squares)}

  return loss
