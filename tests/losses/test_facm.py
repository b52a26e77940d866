"""Flow-anchored consistency: closed forms of both losses, and where gradients flow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian, random_params

from sdiff_jax.diffusion import rectified_flow, trigflow
from sdiff_jax.losses import facm, meanflow
from sdiff_jax.models import mlp
from sdiff_jax.types import CondSpec

SIGMA_D = 0.5
SHAPE = (2, 3)
END_TIME = {trigflow.END_TIME: CondSpec((), "float32")}
OPTIONS = {"power": 0.5, "weight_power": 0.5, "c": 1e-3}
x64 = pytest.mark.usefixtures("x64")


def draws(batch: int = 6):
  rng = np.random.default_rng(0)
  tau = rng.uniform(0.1, 0.99, batch)
  return (jnp.asarray(a) for a in (tau, *rng.normal(size=(2, batch, *SHAPE))))


@x64
@pytest.mark.parametrize("std", [0.2, 0.5, 0.9])
def test_both_losses_vanish_at_the_true_map(std):
  data = Gaussian(jnp.float64(0.1), jnp.float64(std), SIGMA_D)
  tau, x, _ = draws()
  u = rectified_flow.average_velocity(data.flow_map_net, SIGMA_D)
  t, xt = rectified_flow.angle(tau), rectified_flow.to_trigflow(x, tau)
  v = rectified_flow.velocity(data.velocity(xt, t), x, tau)
  anchor = facm.anchor_loss(u(x, tau, tau, None), v)
  np.testing.assert_allclose(anchor, 0, atol=1e-9)
  zero = jnp.zeros_like(tau)
  value, target = meanflow.average_velocity_target(u, x, tau, zero, v, v, None)
  np.testing.assert_allclose(value, target, atol=1e-9)
  shortcut = facm.shortcut_loss(value, target, tau, **OPTIONS)
  np.testing.assert_allclose(shortcut, 0, atol=1e-9)


@x64
def test_the_shortcut_moves_by_the_clipped_and_relaxed_tangent():
  tau, u, noise = draws()
  target = u + 3 * noise
  clipped = jnp.clip(u - target, -1, 1)
  assert float(jnp.mean(jnp.abs(clipped) == 1)) > 0.3
  alpha = trigflow.expand(1 - jnp.sqrt(1 - tau), u)

  def value(u):
    return jnp.sum(facm.shortcut_loss(u, target, tau, **OPTIONS))

  error = jnp.mean((alpha * clipped) ** 2, (1, 2))
  weight = jnp.sin(np.pi * tau / 2) / jnp.sqrt(error + 1e-3)
  np.testing.assert_allclose(value(u), jnp.sum(weight * error), rtol=1e-12)
  expected = trigflow.expand(weight, u) * 2 * alpha * clipped / u[0].size
  np.testing.assert_allclose(jax.grad(value)(u), expected, rtol=1e-9)


def test_the_anchor_is_of_the_velocity_and_the_shortcut_of_the_data():
  net = mlp.build(shape=SHAPE, width=16, depth=2, cond=END_TIME)
  params = random_params(net, dtype="float32")
  ends = []

  def apply(params, x, t, cond, *, key=None):
    ends.append((t, cond[trigflow.END_TIME]))
    return net.apply(params, x, t, cond, key=key)

  loss = facm.build(network=net._replace(apply=apply), sigma_d=SIGMA_D, velocity="data")
  batch = {"x0": jnp.ones((4, *SHAPE)), "cond": {}}
  value, metrics = loss(params, batch, jax.random.key(0), jnp.int32(0), None)
  assert value > metrics["anchor"] > 0
  np.testing.assert_array_equal(*ends[0])
  np.testing.assert_array_equal(ends[1][1], jnp.zeros(4))


def test_gradients_do_not_reach_the_teacher():
  net = mlp.build(shape=SHAPE, width=16, depth=2, cond=END_TIME)
  params = random_params(net, dtype="float32")

  def teacher(frozen, x, t, cond):
    return frozen * x

  loss = facm.build(network=net, sigma_d=SIGMA_D, teacher=teacher)
  batch = {"x0": jnp.ones((4, *SHAPE)), "cond": {}}
  value = functools.partial(loss, params, batch, jax.random.key(0), jnp.int32(0))
  shortcut = jax.grad(lambda frozen: value(frozen)[1]["mse"])(jnp.float32(0.3))
  assert shortcut == 0  # its target is a constant
