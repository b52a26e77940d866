"""A step of training: the gradient's way through half precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdiff_jax import losses
from sdiff_jax.diffusion import trigflow
from sdiff_jax.losses import scm
from sdiff_jax.models import mlp
from sdiff_jax.training import state, step


def loss(params, batch, key, step, frozen):
  half = params["w"].astype(jnp.float16)
  return jnp.sum(half.astype(jnp.float32)) / batch["size"], {}


@pytest.mark.parametrize("scale", [1.0, 2.0**14])
def test_the_loss_scale_saves_a_mean_over_many_from_vanishing(scale):
  rate = optax.constant_schedule(0.1)
  optimizer = optax.sgd(rate)
  current = state.create({"w": jnp.ones(3)}, optimizer, ())
  run = jax.jit(step.build(loss, optimizer, learning_rate=rate, loss_scale=scale))
  size = 2048 * 2**14  # elements of a batch
  batch = {"size": jnp.float32(size)}
  current, metrics = run(current, batch, jax.random.key(0), None)
  np.testing.assert_allclose(metrics["loss"], 3 / size)
  true = 3**0.5 / size
  expected = true if scale > 1 else 0.0  # float16 ends at 6e-8
  np.testing.assert_allclose(metrics["gradient_norm"], expected, rtol=1e-3)


def _batch(rows):
  rng = np.random.default_rng(0)
  batch = {"x0": rng.standard_normal((rows, 2, 2, 1)), "t": rng.uniform(0.1, 1.4, rows)}
  batch["z"] = rng.standard_normal((rows, 2, 2, 1))
  return jax.tree.map(jnp.asarray, batch)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  "parts",
  [
    pytest.param(2, marks=pytest.mark.slow),
    3,
    pytest.param(12, marks=pytest.mark.slow),
  ],
)
def test_a_batch_in_parts_is_the_batch(parts):
  """A step of sCM's loss, whose draws come with the batch, in float64."""
  network = mlp.build(
    shape=(2, 2, 1), cond={}, width=16, depth=2, unroll=2, dtype="float64"
  )

  def loss(params, batch, key, step, frozen):
    x0, z, t = batch["x0"], batch["z"], batch["t"]
    xt, v = trigflow.perturb(x0, z, t), trigflow.velocity(x0, z, t)
    net = functools.partial(network.apply, params)
    F, g = scm.tangent(net, xt, t, v, None, sigma_d=0.5)
    error = F - jax.lax.stop_gradient(F) - g / (losses.tangent_norm(g, rms=True) + 0.1)
    return jnp.mean(jnp.square(error)), {"mean": jnp.mean(F)}

  rate = optax.constant_schedule(0.1)
  params = network.init(jax.random.key(0))
  params = jax.tree.map(
    lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, jnp.float64),
    params,
  )
  current = state.create(params, optax.sgd(rate), ())
  after = [
    jax.jit(
      step.build(
        loss,
        optax.sgd(rate),
        learning_rate=rate,
        grad_accum_steps=n,
        loss_scale=8.0,
      )
    )(current, _batch(12), jax.random.key(0), None)
    for n in (1, parts)
  ]
  (whole, metrics), (sum_of_parts, metrics_of_parts) = after
  close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
  jax.tree.map(close, sum_of_parts, whole)
  jax.tree.map(close, metrics_of_parts, metrics)
  assert metrics["gradient_norm"] > 1e-3


def test_the_parts_of_a_batch_draw_apart():
  """The gradient is the mean of those of each part, each with a key of its own."""

  def loss(params, batch, key, step, frozen):
    draw = jax.random.normal(key, batch["x"].shape)
    return jnp.mean(params["w"] * batch["x"] * draw), {}

  rate = optax.constant_schedule(1.0)
  current = state.create({"w": jnp.zeros(())}, optax.sgd(rate), ())
  x, key = jnp.arange(6.0), jax.random.key(3)
  run = step.build(loss, optax.sgd(rate), learning_rate=rate, grad_accum_steps=2)
  after, _ = jax.jit(run)(current, {"x": x}, key, None)
  keys = [jax.random.fold_in(jax.random.fold_in(key, 0), i) for i in range(2)]
  parts = [jnp.mean(x[i::2] * jax.random.normal(keys[i], (3,))) for i in range(2)]
  np.testing.assert_allclose(after.params["w"], -sum(parts) / 2, rtol=1e-6)
