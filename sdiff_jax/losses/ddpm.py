"""The DDPM loss: the error of the noise at discrete timesteps (arXiv:2006.11239)."""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import noise_schedules, trigflow
from sdiff_jax.fields import Fraction, Positive, Range
from sdiff_jax.losses import _matching
from sdiff_jax.types import Array, LossFn, Network, PRNGKey


@registry.register("losses", "ddpm", title="teacher", family="diffusion")
def build(
  *,
  network: Network,
  sigma_d: Positive,
  schedule: Literal["cosine", "linear", "scaled_linear"] = "cosine",
  timesteps: Annotated[int, Range(2, 100_000)] = 100,
  label_dropout: Fraction = 0.0,
) -> LossFn:
  """Returns E |eps - eps_hat|^2 / D over uniform timesteps n = 0, ..., T - 1 (eq. 14).

  In TrigFlow eps = z / sigma_d and eps_hat = sin t x_t / sigma_d + cos t F, so this is
  E cos^2(t) |F - v / sigma_d|^2 / D with tan t = sigma_n / (alpha_n sigma_d). Whatever
  the network predicts, F is its exact change of variables.

  Args:
    network: the network to train.
    sigma_d: standard deviation of the data.
    schedule: name of the beta schedule, see `noise_schedules.alphas_cumprod`.
    timesteps: number T of discrete timesteps.
    label_dropout: probability of training a sample without its label, which
      classifier-free guidance needs.

  Returns:
    A LossFn that logs "mse".

  Raises:
    ValueError: the schedule is unknown.

  Example:
    >>> network = Network(
    ...   init=lambda key: jnp.float32(0.5),
    ...   apply=lambda params, x, t, cond, *, key=None: params * x,
    ...   logvar=lambda params, t: params * t,
    ... )
    >>> loss = build(network=network, sigma_d=0.5, timesteps=10)
    >>> batch = {"x0": jnp.ones((4, 2)), "cond": None}
    >>> key, step = jax.random.key(0), jnp.int32(0)
    >>> value, metrics = loss(network.init(key), batch, key, step, None)
    >>> bool(value == metrics["mse"])
    True
  """
  abar = noise_schedules.alphas_cumprod(schedule, timesteps)
  times = trigflow.angle(abar**0.5, (1 - abar) ** 0.5, sigma_d)

  def time_sampler(key: PRNGKey, batch: int) -> Array:
    n = jax.random.randint(key, (batch,), 0, timesteps)
    return jnp.asarray(times, jnp.float32)[n]

  return _matching.velocity_matching(
    network=network,
    sigma_d=sigma_d,
    time_sampler=time_sampler,
    label_dropout=label_dropout,
    error_scale=jnp.cos,
  )
