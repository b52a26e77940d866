"""Learning rates by their formulas, optimizers by what they do to a quadratic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdiff_jax.training import optimizers

STEPS = np.array([0, 3, 10, 50, 100])


def rates(**changes) -> np.ndarray:
  options = {
    "schedule": "constant",
    "learning_rate": 0.3,
    "steps": 100,
    "batch_size": 8,
  }
  options |= {"rampup_images": 0, "end_lr_fraction": 0.1, "reference_steps": 10}
  rate = optimizers.build_schedule(**options | changes)
  return np.array([rate(jnp.int32(n)) for n in STEPS])


def options(**changes) -> dict:
  moments = {"name": "adam", "b1": 0.9, "b2": 0.99, "eps": 1e-8}
  return moments | {"weight_decay": 0.0, "clip": 0.0} | changes


def descend(steps: int, rate: float = 0.05, **changes) -> tuple[float, jax.Array]:
  """Returns the value and place that an optimizer reaches on |x - (1, -2)|^2."""
  optimizer = optimizers.build(lambda step: jnp.float32(rate), **options(**changes))

  def value(x):
    return jnp.sum((x - jnp.array([1.0, -2.0])) ** 2)

  @jax.jit
  def update(x, state):
    updates, state = optimizer.update(jax.grad(value)(x), state, x)
    return optax.apply_updates(x, updates), state

  x = jnp.zeros(2)
  state = optimizer.init(x)
  for _ in range(steps):
    with jax.numpy_dtype_promotion("standard"):
      x, state = update(x, state)
  return float(value(x)), x


def test_constant():
  np.testing.assert_allclose(rates(), 0.3, rtol=1e-6)


def test_cosine_ends_at_the_final_share():
  half = (1 + np.cos(np.pi * STEPS / 100)) / 2
  np.testing.assert_allclose(
    rates(schedule="cosine"), 0.3 * (0.1 + 0.9 * half), rtol=1e-5
  )


def test_inverse_sqrt_starts_at_the_reference():
  expected = 0.3 / np.sqrt([1, 1, 1, 5, 10])
  np.testing.assert_allclose(rates(schedule="inverse_sqrt"), expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "inverse_sqrt"])
def test_rampup_counts_images(schedule):
  """Half of 160 images are seen after 10 batches of 8."""
  ramp = np.minimum(STEPS / 20, 1)
  found = rates(schedule=schedule, rampup_images=160)
  np.testing.assert_allclose(found, ramp * rates(schedule=schedule), rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw", "radam"])
def test_optimizers_descend(name):
  start, _ = descend(0, name=name)
  end, _ = descend(200, name=name)
  assert start == 5
  assert end < 0.01


def test_weight_decay_pulls_to_zero():
  _, free = descend(400, name="adamw")
  _, decayed = descend(400, name="adamw", weight_decay=0.5)
  assert np.all(np.abs(decayed) < np.abs(free) - 0.01)


def test_clip_bounds_the_gradient():
  """A far smaller gradient than eps moves Adam in proportion to its norm."""
  moved = [
    np.linalg.norm(descend(1, name="adam", eps=1.0, clip=c)[1]) for c in (1e-3, 2e-3)
  ]
  # The first step of Adam is rate g / (|g| + eps) for each coordinate.
  np.testing.assert_allclose(moved, [0.05e-3, 0.1e-3], rtol=1e-2)


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match=r"^schedule='step': must be one of constant"):
    rates(schedule="step")
  with pytest.raises(ValueError, match=r"^name='sgd': must be one of adam, adamw"):
    optimizers.build(optax.constant_schedule(0.1), **options(name="sgd"))


def test_weight_decay_needs_adamw():
  with pytest.raises(ValueError, match=r"^weight_decay=0\.1: needs name='adamw'"):
    optimizers.build(optax.constant_schedule(0.1), **options(weight_decay=0.1))
