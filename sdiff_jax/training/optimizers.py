"""Optimisers and learning rates, from optax."""

import jax.numpy as jnp
import optax

from sdiff_jax.types import Array, UserError


def schedule(
  *,
  name: str,
  learning_rate: float,
  steps: int,
  batch_size: int,
  rampup_images: float,
  end_lr_fraction: float,
  reference_steps: int,
) -> optax.Schedule:
  """Returns step -> learning rate.

  "constant"; "cosine": to `end_lr_fraction` of the rate over `steps`; "inverse_sqrt":
  rate / sqrt(max(step / reference_steps, 1)) (EDM2, arXiv:2312.02696, eq. 67). Each
  is multiplied by min(images / rampup_images, 1).

  Raises:
    UserError: an unknown name.
  """
  if name not in ("constant", "cosine", "inverse_sqrt"):
    raise UserError(
      f"config.optim.schedule={name!r}: take constant, cosine or inverse_sqrt"
    )
  cosine = optax.cosine_decay_schedule(1.0, max(steps, 1), end_lr_fraction)

  def rate(step: Array) -> Array:
    step = jnp.asarray(step, jnp.float32)
    ramp = 1.0
    if rampup_images:
      ramp = jnp.minimum(step * (batch_size / rampup_images), 1.0)
    if name == "cosine":
      ramp *= cosine(step)
    elif name == "inverse_sqrt":
      ramp /= jnp.sqrt(jnp.maximum(step / reference_steps, 1.0))
    return learning_rate * ramp

  return rate


def build(
  rate: optax.Schedule,
  *,
  name: str,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip: float,
) -> optax.GradientTransformation:
  """Returns the optimiser with a learning rate.

  Args:
    rate: step -> learning rate.
    name: adam, adamw or radam.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled decay, adamw alone.
    clip: bound on the global norm of the gradient, 0 for none.

  Raises:
    UserError: an unknown name, or weight decay without adamw.
  """
  if weight_decay and name != "adamw":
    raise UserError(f"config.optim.weight_decay={weight_decay}: needs optim.name=adamw")
  moments = {"b1": b1, "b2": b2, "eps": eps}
  if name == "adam":
    optimizer = optax.adam(rate, **moments)
  elif name == "adamw":
    optimizer = optax.adamw(rate, weight_decay=weight_decay, **moments)
  elif name == "radam":
    optimizer = optax.radam(rate, **moments)
  else:
    raise UserError(f"config.optim.name={name!r}: take adam, adamw or radam")
  return optax.chain(optax.clip_by_global_norm(clip), optimizer) if clip else optimizer
