"""The velocity dx_t/dt that a consistency model follows: of the data or a teacher's."""

from collections.abc import Callable

import jax

from sdiff_jax.diffusion import guidance as cfg
from sdiff_jax.diffusion import trigflow
from sdiff_jax.types import Array, Cond, Params, PRNGKey

# (frozen, x0, z, xt, t, cond) -> v [B, ...]
VelocityFn = Callable[..., Array]


def velocity_target(
  name: str,
  teacher: Callable[..., Array] | None,
  *,
  sigma_d: float,
  guidance: tuple[float, ...] = (),
) -> VelocityFn:
  """Returns the velocity of the field loss.velocity.

  Args:
    name: "data" is cos(t) z - sin(t) x0, its unbiased estimate: consistency training;
      "teacher" is sigma_d F_pretrain(x_t / sigma_d, t): distillation. Where cond has a
      guidance scale s, F_pretrain is F_u + s (F_c - F_u) (arXiv:2410.11081, sec. 5.2).
    teacher: (frozen, x, t, cond) -> F.
    sigma_d: standard deviation of the data.
    guidance: of the loss, only to refuse it.

  Raises:
    ValueError: another name, or guidance without a teacher.
  """
  if name not in ("data", "teacher"):
    raise ValueError(f"loss.velocity={name!r}: take 'teacher' or 'data'")
  if guidance and name == "data":
    raise ValueError(f"loss.guidance={guidance}: only loss.velocity='teacher' can")

  def of_data(
    frozen: Params, x0: Array, z: Array, xt: Array, t: Array, cond: Cond
  ) -> Array:
    del frozen, xt, cond
    return trigflow.velocity(x0, z, t)

  def of_teacher(
    frozen: Params, x0: Array, z: Array, xt: Array, t: Array, cond: Cond
  ) -> Array:
    del x0, z

    def net(x: Array, t: Array, cond: Cond) -> Array:
      return teacher(frozen, x, t, cond)

    if cond is not None and "guidance" in cond:
      cond = dict(cond)
      net = cfg.classifier_free(net, cond.pop("guidance"))
    return sigma_d * net(xt / sigma_d, t, cond)

  return of_data if name == "data" else of_teacher


def sample_guidance_scale(
  key: PRNGKey, t: Array, cond: Cond, guidance: tuple[float, ...]
) -> Cond:
  """Returns cond with a guidance scale for each sample, uniform in (low, high).

  Args:
    key: random key.
    t: angles, [B].
    cond: conditions of the data.
    guidance: (low, high), or () for none: cond as it is.
  """
  if not guidance:
    return cond
  low, high = guidance
  return cond | {"guidance": jax.random.uniform(key, t.shape, t.dtype, low, high)}
