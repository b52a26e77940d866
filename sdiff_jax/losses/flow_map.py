"""Two-time flow maps: networks that jump from any time t to any earlier time s.

The consistency model is the case s = 0, the diffusion model the case s = t. Distilled
from a teacher it is the Eulerian map distillation of AYF (arXiv:2506.14603) on the
TrigFlow process, which rCM calls sCTM (arXiv:2510.08431, appendix F.1); trained on data
it is MeanFlow's objective (arXiv:2505.13447) on that process. AYF's autoguided teacher is
a teacher like another, of one scale (`guidance.autoguided`; the field teacher.autoguidance
of a config); its adversarial fine-tuning is left out.
"""

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.fields import Fraction, Positive
from sdiff_jax.losses import _tangent, _velocity, scm
from sdiff_jax.losses._tangent import DEFAULT_OPTIONS, ConsistencyOptions, Times
from sdiff_jax.losses._velocity import TeacherFn, Velocity
from sdiff_jax.types import Array, Cond, CondSpec, LossFn, NetFn, Network, PRNGKey


def tangent(
  net: NetFn,
  xt: Array,
  t: Array,
  v: Array,
  cond: Cond,
  *,
  sigma_d: float,
  r: Array | float = 1.0,
  s: Array,
) -> tuple[Array, Array]:
  """Returns F(x_t, t, s) and the tangent g = cos(t - s) df/dt, s held fixed.

  f(x_t, t, s) = cos(t - s) x_t - sin(t - s) sigma_d F(x_t / sigma_d, t, s); see
  `scm.tangent`. The network is given s as the condition "end_time".

  Args:
    net: network with its parameters bound.
    xt: states, [B, ...].
    t: TrigFlow times, [B].
    v: dx_t/dt at xt, [B, ...].
    cond: the other conditions of the network.
    sigma_d: standard deviation of the data.
    r: warm-up in [0, 1].
    s: end times, [B], s <= t.

  Example:
    >>> xt, t, v = jnp.ones((2, 3)), jnp.full(2, 0.5), jnp.zeros((2, 3))
    >>> F, g = tangent(lambda x, t, cond: x, xt, t, v, None, sigma_d=0.5, s=0.5 * t)
    >>> F.shape, g.shape
    ((2, 3), (2, 3))
  """
  cond = trigflow.with_end_time(cond, s)
  return scm.tangent(net, xt, t, v, cond, sigma_d=sigma_d, r=r, s=s)


@registry.register(
  "losses",
  "flow_map",
  title="flow map",
  description="The flow map jumps from any time to any earlier one.",
  family="consistency",
  needs_teacher=lambda fields: fields["velocity"] == "teacher",
  cond={trigflow.END_TIME: CondSpec((), "float32")},
)
def build(
  *,
  network: Network,
  sigma_d: Positive,
  teacher: TeacherFn | None = None,
  velocity: Velocity = "teacher",
  diffusion_fraction: Fraction = 0.25,
  consistency_fraction: Fraction = 0.0,
  options: ConsistencyOptions = DEFAULT_OPTIONS,
) -> LossFn:
  """Returns E[e^w |F - F^- - g|^2 / D - w] with the tangent of the two-time map.

  The end time s is t in a fraction of the samples, 0 in another, and uniform in [0, t]
  in the rest.

  Args:
    network: the network to train, with the condition "end_time".
    sigma_d: standard deviation of the data.
    teacher: the teacher network; only velocity="teacher" uses it.
    velocity: "teacher" distills a teacher, "data" trains on data.
    diffusion_fraction: fraction of the samples with s = t.
    consistency_fraction: fraction of the samples with s = 0.
    options: times, normalization, warm-up, weight and guidance.

  Returns:
    A LossFn that logs "mse" and "tangent_norm".

  Raises:
    ValueError: there is no teacher to distill, guidance is requested without one, or
      the fractions sum to more than 1.

  Example:
    >>> network = Network(
    ...   init=lambda key: jnp.float32(0.5),
    ...   apply=lambda params, x, t, cond, *, key=None: params * x,
    ...   logvar=lambda params, t: params * t,
    ... )
    >>> loss = build(network=network, sigma_d=0.5, velocity="data")
    >>> batch = {"x0": jnp.ones((4, 2)), "cond": None}
    >>> key, step = jax.random.key(0), jnp.int32(0)
    >>> value, metrics = loss(network.init(key), batch, key, step, None)
    >>> sorted(metrics)
    ['mse', 'tangent_norm']
  """
  check_fractions(diffusion_fraction, consistency_fraction)

  def time_sampler(key: PRNGKey, batch: int) -> Times:
    t = time_grids.log_normal(
      key, batch, p_mean=options.p_mean, p_std=options.p_std, sigma_d=sigma_d
    )
    s = end_times(
      jax.random.fold_in(key, 1), t, diffusion_fraction, consistency_fraction
    )
    return Times(t, s, t - s)

  return _tangent.tangent_loss(
    network=network,
    sigma_d=sigma_d,
    time_sampler=time_sampler,
    velocity=_velocity.build(
      velocity, teacher, sigma_d=sigma_d, guidance=options.guidance
    ),
    tangent=tangent,
    options=options,
  )


def check_fractions(diffusion_fraction: float, consistency_fraction: float) -> None:
  """Checks the fractions of the samples with s = t and with s = 0.

  Args:
    diffusion_fraction: fraction of the samples with s = t.
    consistency_fraction: fraction of the samples with s = 0.

  Raises:
    ValueError: they sum to more than 1.

  Example:
    >>> check_fractions(0.5, 0.5)
  """
  if diffusion_fraction + consistency_fraction > 1:
    raise ValueError(
      f"diffusion_fraction={diffusion_fraction}: must be at most 1 - "
      f"consistency_fraction = {1 - consistency_fraction:g}"
    )


def end_times(
  key: PRNGKey, t: Array, diffusion_fraction: float, consistency_fraction: float
) -> Array:
  """Returns end times s <= t, [B]: t, 0, or uniform in [0, t].

  Args:
    key: random key.
    t: TrigFlow times, [B].
    diffusion_fraction: probability of s = t.
    consistency_fraction: probability of s = 0.

  Example:
    >>> end_times(jax.random.key(0), jnp.ones(3), 1.0, 0.0).tolist()
    [1.0, 1.0, 1.0]
  """
  key_kind, key_s = jax.random.split(key)
  kind = jax.random.uniform(key_kind, t.shape, t.dtype)
  s = t * jax.random.uniform(key_s, t.shape, t.dtype)
  s = jnp.where(kind < diffusion_fraction, t, s)
  return jnp.where(kind >= 1 - consistency_fraction, 0.0, s)
