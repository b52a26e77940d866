"""A step of training: the gradient's way through half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdiff_jax import state, step


def loss(params, batch, key, step, frozen):
  half = params["w"].astype(jnp.float16)
  return jnp.sum(half.astype(jnp.float32)) / batch["size"], {}


@pytest.mark.parametrize("scale", [1.0, 2.0**14])
def test_the_loss_scale_saves_a_mean_over_many_from_vanishing(scale):
  rate = optax.constant_schedule(0.1)
  optimizer = optax.sgd(rate)
  current = state.create({"w": jnp.ones(3)}, optimizer, ())
  run = jax.jit(step.build(loss, optimizer, {}, rate, loss_scale=scale))
  size = 2048 * 2**14  # elements of a batch
  batch = {"size": jnp.float32(size)}
  current, metrics = run(current, batch, jax.random.key(0), None)
  np.testing.assert_allclose(metrics["loss"], 3 / size)
  true = 3**0.5 / size
  expected = true if scale > 1 else 0.0  # float16 ends at 6e-8
  np.testing.assert_allclose(metrics["gradient_norm"], expected, rtol=1e-3)
