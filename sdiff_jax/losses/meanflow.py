"""MeanFlow and improved MeanFlow: the average velocity of rectified flow.

MeanFlow (arXiv:2505.13447) regresses u(x, tau, r) on v - (tau - r) du/dtau, where v is the
velocity of the data. Improved MeanFlow (iMF, arXiv:2512.02012) takes the derivative along
the network's own velocity u(x, tau, tau) instead, so that V = u + (tau - r) du/dtau, which
is regressed on v, depends on x alone.

The network is TrigFlow's two-time network, of which u is an exact change of variables
(see `diffusion.rectified_flow`); the solver `flow_map` samples it. Of MeanFlow, the mixing
of u(x, tau, tau) into the velocity (kappa) is left out; of iMF, the second head of the
network for v, and the interval of guidance as an input of the network.
"""

import functools
import math

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import guidance as cfg
from sdiff_jax.diffusion import rectified_flow, time_grids, trigflow
from sdiff_jax.diffusion.rectified_flow import AverageVelocity
from sdiff_jax.fields import Fraction, LogMean, NotNegative, Positive
from sdiff_jax.losses import _velocity
from sdiff_jax.losses._velocity import GuidanceRange
from sdiff_jax.types import (
  Array,
  Batch,
  Cond,
  CondSpec,
  LossFn,
  Metrics,
  Network,
  Params,
  PRNGKey,
)


def average_velocity_target(
  u: AverageVelocity,
  x: Array,
  tau: Array,
  r: Array,
  v: Array,
  direction: Array,
  cond: Cond,
) -> tuple[Array, Array]:
  """Returns u(x, tau, r) and its target v - (tau - r) du/dtau.

  du/dtau = grad_x u direction + d_tau u is the derivative along a path of that velocity,
  r held fixed. It comes from one jvp, whose primal output is u (arXiv:2505.13447, eq. 10).

  Args:
    u: the average velocity.
    x: states, [B, ...].
    tau: times of rectified flow, [B].
    r: end times, [B], r <= tau.
    v: velocity at x that u is to average, [B, ...].
    direction: velocity dx/dtau of the path, [B, ...]: v in MeanFlow, u(x, tau, tau) in
      iMF.
    cond: conditions of the network.

  Returns:
    u [B, ...], through which gradients flow, and the target [B, ...], through which none
    flow.

  Example:
    >>> x, tau, r = jnp.ones((1, 2)), jnp.ones(1), jnp.zeros(1)
    >>> u = lambda x, tau, r, cond: x * tau[:, None]
    >>> value, target = average_velocity_target(u, x, tau, r, x, 3 * x, None)
    >>> value.tolist(), target.tolist()
    ([[1.0, 1.0]], [[-3.0, -3.0]])
  """
  value, slope = jax.jvp(
    lambda x, tau: u(x, tau, r, cond), (x, tau), (direction, jnp.ones_like(tau))
  )
  target = v - trigflow.expand(tau - r, x) * slope
  return value, jax.lax.stop_gradient(target)


def guided_velocities(
  u: AverageVelocity, x: Array, tau: Array, v: Array, cond: Cond, *, improved: bool
) -> tuple[Array, Array]:
  """Returns the velocity that u is to average, and that of the path.

  Without a guidance scale w in the conditions they are v, and v or (iMF) u(x, tau, tau).
  With one, v_u is u(x, tau, tau) without a label and at scale 1. MeanFlow's velocity is
  then w v + (1 - w) v_u, along which its path goes, too (arXiv:2505.13447, eq. 17). That of
  iMF is v + (1 - 1/w) (v_c - v_u) with v_c = u(x, tau, tau) at scale w, and its path goes
  along v_c; both have the same mean where v_c is right (arXiv:2512.02012, section 4).
  A sample without a label has v.

  Args:
    u: the average velocity.
    x: states, [B, ...].
    tau: times of rectified flow, [B].
    v: z - x0, [B, ...].
    cond: conditions of the network.
    improved: whether the form is that of iMF.

  Returns:
    Both velocities, [B, ...], without gradients.

  Example:
    >>> x = jnp.ones((1, 2))
    >>> u = lambda x, tau, r, cond: 2 * x
    >>> v, path = guided_velocities(u, x, jnp.ones(1), 5 * x, None, improved=True)
    >>> v.tolist(), path.tolist()
    ([[5.0, 5.0]], [[2.0, 2.0]])
  """
  own = u(x, tau, tau, cond) if improved else v
  if cond and "guidance" in cond:
    w = trigflow.expand(cond["guidance"], x)
    unlabeled = cfg.unlabeled(cfg.with_scale(cond, jnp.ones_like(tau)))
    v_u = u(x, tau, tau, unlabeled)
    guided = v + (1 - 1 / w) * (own - v_u) if improved else w * v + (1 - w) * v_u
    v = jnp.where(trigflow.expand(cond["label"] == cfg.NO_LABEL, x), v, guided)
  return jax.lax.stop_gradient((v, own if improved else v))


def sorted_times(
  key: PRNGKey,
  batch: int,
  *,
  p_mean: float,
  p_std: float,
  sigma_d: float,
  diffusion_fraction: float,
) -> tuple[Array, Array]:
  """Draws times tau and r <= tau of rectified flow, [B] each.

  They are the larger and the smaller of two draws; in a fraction of the samples r = tau.

  Args:
    key: random key.
    batch: number of pairs B.
    p_mean: mean of ln(sigma_d tan t), which is that of ln(tau / (1 - tau)) plus
      ln(sigma_d).
    p_std: standard deviation of it.
    sigma_d: standard deviation of the data.
    diffusion_fraction: probability of r = tau.

  Example:
    >>> tau, r = sorted_times(
    ...   jax.random.key(0), 4, p_mean=-1.1, p_std=1.0, sigma_d=0.5, diffusion_fraction=0.5
    ... )
    >>> bool((r <= tau).all())
    True
  """
  key_t, key_kind = jax.random.split(key)
  t = time_grids.log_normal(
    key_t, 2 * batch, p_mean=p_mean, p_std=p_std, sigma_d=sigma_d
  )
  first, second = rectified_flow.time(t).reshape(2, batch)
  tau, r = jnp.maximum(first, second), jnp.minimum(first, second)
  return tau, jnp.where(
    jax.random.bernoulli(key_kind, diffusion_fraction, r.shape), tau, r
  )


@registry.register(
  "losses",
  "meanflow",
  title=lambda fields: "iMF" if fields["improved"] else "MeanFlow",
  description="MeanFlow is a flow map trained on data: its network averages a velocity.",
  family="consistency",
  cond={trigflow.END_TIME: CondSpec((), "float32")},
)
def build(
  *,
  network: Network,
  sigma_d: Positive,
  improved: bool = False,
  diffusion_fraction: Fraction = 0.75,
  p_mean: LogMean = -1.1,
  p_std: Positive = 1.0,
  weight_power: NotNegative = 1.0,
  c: Positive = 0.001,
  label_dropout: Fraction = 0.1,
  guidance: GuidanceRange = (),
) -> LossFn:
  """Returns E[w |u(x, tau, r) - u^tgt|^2 / D], w = 1 / (|u - u^tgt|^2 + c)^p.

  u^tgt = v - (tau - r) du/dtau, and neither it nor w has gradients. The defaults are those
  of the paper for latents of ImageNet with 256 x 256 pixels.

  Args:
    network: the network to train, with the condition "end_time".
    sigma_d: standard deviation of the data.
    improved: whether the derivative goes along the network's own velocity (iMF, for which
      the paper has diffusion_fraction=0.5 and c=0.01).
    diffusion_fraction: fraction of the samples with r = tau.
    p_mean: mean of ln(sigma_d tan t) in training, see `sorted_times`.
    p_std: standard deviation of ln(sigma_d tan t) in training.
    weight_power: exponent p of the weight; 0 for no weight.
    c: constant of the weight, where |.|^2 is a sum over the D numbers of a sample, in
      units of sigma_d^2.
    label_dropout: probability of training a sample without its label, with guidance.
    guidance: (low, high) scales of classifier-free guidance that the network learns from
      its own velocity without a label, () for none.

  Returns:
    A LossFn that logs "mse".

  Raises:
    ValueError: guidance is not a range of scales of at least 1.

  Example:
    >>> network = Network(
    ...   init=lambda key: jnp.float32(0.5),
    ...   apply=lambda params, x, t, cond, *, key=None: params * x,
    ...   logvar=lambda params, t: params * t,
    ... )
    >>> loss = build(network=network, sigma_d=0.5)
    >>> batch = {"x0": jnp.ones((4, 2)), "cond": None}
    >>> key, step = jax.random.key(0), jnp.int32(0)
    >>> value, metrics = loss(network.init(key), batch, key, step, None)
    >>> value.shape, sorted(metrics)
    ((), ['mse'])
  """
  _velocity.check_guidance(guidance)
  if guidance and guidance[0] < 1:
    raise ValueError(f"guidance={tuple(guidance)}: must be scales of at least 1")

  def loss(
    params: Params, batch: Batch, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, Metrics]:
    del step, frozen
    x0 = batch["x0"]
    key_t, key_z, key_w, key_label, key_dropout = jax.random.split(key, 5)
    tau, r = sorted_times(
      key_t,
      x0.shape[0],
      p_mean=p_mean,
      p_std=p_std,
      sigma_d=sigma_d,
      diffusion_fraction=diffusion_fraction,
    )
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    x = rectified_flow.perturb(x0, z, tau)
    cond = cfg.sample_scale(key_w, tau, batch["cond"], tuple(guidance))
    if guidance:
      cond = cfg.drop_labels(key_label, cond, label_dropout)
    net = functools.partial(network.apply, params, key=key_dropout)
    u = rectified_flow.average_velocity(net, sigma_d)
    v, direction = guided_velocities(u, x, tau, z - x0, cond, improved=improved)
    value, target = average_velocity_target(u, x, tau, r, v, direction, cond)
    error = (value - target) / sigma_d
    mse = jnp.mean(jnp.square(error), tuple(range(1, error.ndim)))
    D = math.prod(x0.shape[1:])
    weight = (D * jax.lax.stop_gradient(mse) + c) ** -weight_power
    return jnp.mean(weight * mse), {"mse": jnp.mean(mse)}

  return loss
