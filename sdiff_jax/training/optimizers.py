"""Optimizers and learning rates, from optax."""

from typing import Literal

import jax.numpy as jnp
import optax

from sdiff_jax import fields
from sdiff_jax.fields import Count, Fraction, Index, NotNegative, Positive, Rate
from sdiff_jax.types import Array

ScheduleName = Literal["constant", "cosine", "inverse_sqrt"]
OptimizerName = Literal["adam", "adamw", "radam"]


@fields.checked
def build_schedule(
  *,
  schedule: ScheduleName = "constant",
  learning_rate: Positive,
  steps: Index,
  batch_size: Count,
  rampup_images: NotNegative = 0.0,
  end_lr_fraction: Fraction = 0.0,
  reference_steps: Count = 35_000,
) -> optax.Schedule:
  """Returns step -> learning rate.

  Args:
    schedule: "constant"; "cosine" decays to `end_lr_fraction` of the rate over `steps`;
      "inverse_sqrt" is rate / sqrt(max(step / reference_steps, 1)) (EDM2,
      arXiv:2312.02696, eq. 67).
    learning_rate: the rate before any decay.
    steps: number of training steps.
    batch_size: images of a step.
    rampup_images: the rate is multiplied by min(images / rampup_images, 1); 0 for no
      ramp-up.
    end_lr_fraction: final rate of "cosine", as a fraction of `learning_rate`.
    reference_steps: steps before the decay of "inverse_sqrt".

  Raises:
    ValueError: an argument is not what it may be.

  Example:
    >>> rate = build_schedule(
    ...   schedule="cosine", learning_rate=0.1, steps=100, batch_size=8
    ... )
    >>> round(float(rate(50)), 6)
    0.05
  """
  cosine = optax.cosine_decay_schedule(1.0, max(steps, 1), end_lr_fraction)

  def rate(step: Array) -> Array | float:
    step = jnp.asarray(step, jnp.float32)
    ramp: Array | float = 1.0
    if rampup_images:
      ramp = jnp.minimum(step * (batch_size / rampup_images), 1.0)
    if schedule == "cosine":
      ramp *= cosine(step)
    elif schedule == "inverse_sqrt":
      ramp /= jnp.sqrt(jnp.maximum(step / reference_steps, 1.0))
    return learning_rate * ramp

  return rate


@fields.checked
def build(
  rate: optax.Schedule,
  *,
  name: OptimizerName = "adam",
  b1: Rate = 0.9,
  b2: Rate = 0.999,
  eps: NotNegative = 1e-8,
  weight_decay: NotNegative = 0.0,
  clip: NotNegative = 0.0,
) -> optax.GradientTransformation:
  """Returns an optimizer with a learning rate.

  Args:
    rate: step -> learning rate.
    name: "adam", "adamw" or "radam".
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the square root of the second moment.
    weight_decay: decoupled weight decay, for "adamw" alone.
    clip: bound of the global norm of the gradient, 0 for none.

  Raises:
    ValueError: an argument is not what it may be, or there is weight decay without
      "adamw".

  Example:
    >>> optimizer = build(lambda step: 0.1, name="radam")
    >>> state = optimizer.init({"w": jnp.ones(2)})
  """
  if weight_decay and name != "adamw":
    raise ValueError(f"weight_decay={weight_decay}: needs name='adamw'")
  moments = {"b1": b1, "b2": b2, "eps": eps}
  if name == "adamw":
    optimizer = optax.adamw(rate, weight_decay=weight_decay, **moments)
  else:
    optimizer = {"adam": optax.adam, "radam": optax.radam}[name](rate, **moments)
  return optax.chain(optax.clip_by_global_norm(clip), optimizer) if clip else optimizer
