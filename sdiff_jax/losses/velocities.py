"""The velocity dx_t/dt that a consistency model follows: of the data or a teacher's.

A velocity is a function (frozen, x0, z, xt, t, cond, key) -> (v [B, ...], cond); the
returned cond is what the student sees, with the guidance scale drawn for it, if any.
"""

from collections.abc import Callable

import jax

from sdiff_jax import guidance as cfg
from sdiff_jax import trigflow
from sdiff_jax.interfaces import Array, Cond, Params, PRNGKey

Velocity = Callable[..., tuple[Array, Cond]]


def data() -> Velocity:
  """Returns the unbiased estimate cos(t) z - sin(t) x0: consistency training."""

  def velocity(
    frozen: Params, x0: Array, z: Array, xt: Array, t: Array, cond: Cond, key: PRNGKey
  ) -> tuple[Array, Cond]:
    del frozen, xt, key
    return trigflow.velocity(x0, z, t), cond

  return velocity


def teacher(
  apply: Callable[..., Array], *, sigma_d: float, guidance: tuple[float, float] | None
) -> Velocity:
  """Returns sigma_d F_pretrain(x_t / sigma_d, t): consistency distillation.

  Args:
    apply: the teacher, (frozen, x, t, cond) -> F.
    sigma_d: standard deviation of the data.
    guidance: None, or the range (low, high) from which each sample's scale s is
      drawn; the velocity is then that of F_u + s (F_c - F_u), and the student gets
      cond["guidance"] = s (arXiv:2410.11081, section 5.2).
  """

  def velocity(
    frozen: Params, x0: Array, z: Array, xt: Array, t: Array, cond: Cond, key: PRNGKey
  ) -> tuple[Array, Cond]:
    del x0, z

    def net(x: Array, t: Array, cond: Cond) -> Array:
      return apply(frozen, x, t, cond)

    if guidance is None:
      return sigma_d * net(xt / sigma_d, t, cond), cond
    low, high = guidance
    scale = jax.random.uniform(key, t.shape, t.dtype, low, high)
    v = sigma_d * cfg.classifier_free(net, scale)(xt / sigma_d, t, cond)
    return v, cond | {"guidance": scale}

  return velocity
