"""The TrigFlow diffusion loss: regression on the velocity."""

import functools

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids
from sdiff_jax.fields import Fraction, LogMean, Positive
from sdiff_jax.losses import _matching
from sdiff_jax.types import LossFn, Network


@registry.register(
  "losses",
  "diffusion",
  title="teacher",
  description="The teacher is a diffusion model, sampled in many steps.",
  family="diffusion",
)
def build(
  *,
  network: Network,
  sigma_d: Positive,
  p_mean: LogMean = -1.2,
  p_std: Positive = 1.2,
  label_dropout: Fraction = 0.1,
  adaptive_weight: bool = True,
) -> LossFn:
  """Returns E[e^w |F(x_t / sigma_d, t) - v_t / sigma_d|^2 / D - w], w = w_phi(t).

  Args:
    network: the network to train.
    sigma_d: standard deviation of the data.
    p_mean: mean of ln(sigma_d tan t) in training.
    p_std: standard deviation of ln(sigma_d tan t) in training.
    label_dropout: probability of training a sample without its label, which
      classifier-free guidance needs.
    adaptive_weight: whether w_phi(t) is learned; otherwise w = 0.

  Returns:
    A LossFn that logs "mse" (arXiv:2410.11081, section 3, and eq. 8 with v in place of
    the tangent).

  Example:
    >>> import jax
    >>> network = Network(
    ...   init=lambda key: jax.numpy.float32(0.5),
    ...   apply=lambda params, x, t, cond, *, key=None: params * x,
    ...   logvar=lambda params, t: params * t,
    ... )
    >>> loss = build(network=network, sigma_d=0.5)
    >>> batch = {"x0": jax.numpy.ones((4, 2)), "cond": None}
    >>> key, step = jax.random.key(0), jax.numpy.int32(0)
    >>> value, metrics = loss(network.init(key), batch, key, step, None)
    >>> value.shape, sorted(metrics)
    ((), ['mse'])
  """
  return _matching.velocity_matching(
    network=network,
    sigma_d=sigma_d,
    time_sampler=functools.partial(
      time_grids.log_normal, p_mean=p_mean, p_std=p_std, sigma_d=sigma_d
    ),
    label_dropout=label_dropout,
    adaptive_weight=adaptive_weight,
  )
