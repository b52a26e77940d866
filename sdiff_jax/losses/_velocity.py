"""The velocity dx_t/dt along which a consistency model is trained."""

from collections.abc import Callable
from typing import Annotated, Literal, Protocol

from sdiff_jax.diffusion import guidance as cfg
from sdiff_jax.diffusion import trigflow
from sdiff_jax.fields import Length, Range
from sdiff_jax.types import Array, Cond, Params

# (parameters, x_t / sigma_d, t, cond) -> F: the `apply` of a teacher network.
TeacherFn = Callable[[Params, Array, Array, Cond], Array]
Velocity = Literal["teacher", "data"]
# (low, high) scales of classifier-free guidance, or ().
GuidanceRange = Annotated[tuple[float, ...], Range(0, 1000), Length(0, 2)]


def check_guidance(guidance: tuple[float, ...]) -> None:
  """Checks a range of guidance scales.

  Raises:
    ValueError: it is neither empty nor two scales in ascending order.
  """
  if guidance and (len(guidance) != 2 or guidance[0] > guidance[1]):
    raise ValueError(
      f"guidance={tuple(guidance)}: must be () or (low, high), in ascending order"
    )


class VelocityFn(Protocol):
  """The velocity at states x_t = cos(t) x0 + sin(t) z, [B, ...].

  Args:
    frozen: parameters of the teacher, or None.
    x0: data, [B, ...].
    z: noise of standard deviation sigma_d, [B, ...].
    xt: states, [B, ...].
    t: TrigFlow times, [B].
    cond: conditions of the network.
  """

  def __call__(
    self, frozen: Params, x0: Array, z: Array, xt: Array, t: Array, cond: Cond
  ) -> Array: ...


def velocity_target(
  frozen: Params, x0: Array, z: Array, xt: Array, t: Array, cond: Cond
) -> Array:
  """Returns cos(t) z - sin(t) x0, the unbiased estimate of the velocity from data."""
  del frozen, xt, cond
  return trigflow.velocity(x0, z, t)


def ode_field(teacher: TeacherFn, *, sigma_d: float) -> VelocityFn:
  """Returns the velocity of a teacher's probability flow, sigma_d F(x_t / sigma_d, t).

  Where the conditions hold a guidance scale s, F is F_u + s (F_c - F_u)
  (arXiv:2410.11081, section 5.2).

  Args:
    teacher: the teacher network.
    sigma_d: standard deviation of the data.
  """

  def velocity(
    frozen: Params, x0: Array, z: Array, xt: Array, t: Array, cond: Cond
  ) -> Array:
    del x0, z

    def net(x: Array, t: Array, cond: Cond) -> Array:
      return teacher(frozen, x, t, cond)

    return sigma_d * cfg.at_sampled_scale(net)(xt / sigma_d, t, cond)

  return velocity


def build(
  velocity: Velocity,
  teacher: TeacherFn | None,
  *,
  sigma_d: float,
  guidance: tuple[float, ...] = (),
) -> VelocityFn:
  """Returns the velocity of a name.

  Args:
    velocity: "data" for consistency training along `velocity_target`, "teacher" for
      distillation along `ode_field`.
    teacher: the teacher network; "data" does not use it.
    sigma_d: standard deviation of the data.
    guidance: range of guidance scales that the loss distills, () for none.

  Raises:
    ValueError: there is no teacher to distill, or guidance is requested without one.
  """
  if velocity == "data":
    if guidance:
      raise ValueError(f"guidance={guidance}: only velocity='teacher' can distill it")
    return velocity_target
  if teacher is None:
    raise ValueError("velocity='teacher': needs a teacher network")
  return ode_field(teacher, sigma_d=sigma_d)
