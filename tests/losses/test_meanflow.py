"""MeanFlow: its target at the true map and by finite differences, and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian, central, random_params

from sdiff_jax import losses
from sdiff_jax.diffusion import rectified_flow, trigflow
from sdiff_jax.losses import diffusion, meanflow
from sdiff_jax.models import mlp
from sdiff_jax.types import CondSpec, Network

SIGMA_D = 0.5
SHAPE = (2, 3)
END_TIME = {trigflow.END_TIME: CondSpec((), "float32")}
x64 = pytest.mark.usefixtures("x64")


def draws(batch: int = 6):
  rng = np.random.default_rng(0)
  tau = rng.uniform(0.1, 0.99, batch)
  r = tau * rng.uniform(0.0, 0.9, batch)
  x, v = rng.normal(size=(2, batch, *SHAPE))
  return (jnp.asarray(a) for a in (tau, r, x, v))


@functools.cache
def network(dtype: str = "float32"):
  net = mlp.build(shape=SHAPE, width=16, depth=2, cond=END_TIME, dtype=dtype)
  return net, random_params(net, dtype=dtype)


@x64
@pytest.mark.parametrize("std", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("improved", [False, True])
def test_the_target_at_the_true_map_is_the_map(std, improved):
  data = Gaussian(jnp.float64(0.1), jnp.float64(std), SIGMA_D)
  tau, r, x, _ = draws()
  u = rectified_flow.average_velocity(data.flow_map_net, SIGMA_D)
  t, xt = rectified_flow.angle(tau), rectified_flow.to_trigflow(x, tau)
  v = rectified_flow.velocity(data.velocity(xt, t), x, tau)
  v, direction = meanflow.guided_velocities(u, x, tau, v, None, improved=improved)
  value, target = meanflow.average_velocity_target(u, x, tau, r, v, direction, None)
  np.testing.assert_allclose(value, target, atol=1e-9)
  wrong = meanflow.average_velocity_target(u, x, tau, r, v, v + 0.1, None)[1]
  if std != SIGMA_D:  # otherwise the map does not depend on the state
    assert float(jnp.max(jnp.abs(wrong - value))) > 1e-3
  path = u(x - trigflow.expand(tau - r, x) * value, r, r, None)
  assert np.isfinite(path).all()


@x64
def test_the_target_is_a_finite_difference_of_the_average_velocity():
  net, params = network("float64")
  u = rectified_flow.average_velocity(functools.partial(net.apply, params), SIGMA_D)
  tau, r, x, v = draws()
  slope = central(
    lambda x, tau: u(x, tau, r, None), (x, tau), (2 * v, jnp.ones_like(tau))
  )
  value, target = meanflow.average_velocity_target(u, x, tau, r, v, 2 * v, None)
  expected = v - trigflow.expand(tau - r, x) * slope
  np.testing.assert_allclose(target, expected, rtol=1e-6, atol=1e-7)
  np.testing.assert_array_equal(value, u(x, tau, r, None))


@x64
@pytest.mark.parametrize(
  "improved", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_the_gradient_is_that_of_a_regression_on_a_constant(improved):
  net, params = network("float64")
  tau, r, x, v = draws()

  def parts(params):
    u = rectified_flow.average_velocity(functools.partial(net.apply, params), SIGMA_D)
    pair = meanflow.guided_velocities(u, x, tau, v, None, improved=improved)
    return meanflow.average_velocity_target(u, x, tau, r, *pair, None)

  constant = parts(params)[1]

  def value(params):
    u, target = parts(params)
    return jnp.sum((u - target) ** 2)

  def regression(params):
    u = rectified_flow.average_velocity(functools.partial(net.apply, params), SIGMA_D)
    return jnp.sum((u(x, tau, r, None) - constant) ** 2)

  gradients = (jax.grad(f)(params) for f in (value, regression))
  for ours, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


@x64
def test_guidance_mixes_in_the_velocity_without_a_label():
  def u(x, tau, r, cond):  # u without a label is x, and 3 w x with one
    labeled = trigflow.expand(cond["label"] >= 0, x)
    return jnp.where(labeled, 3 * trigflow.expand(cond["guidance"], x), 1.0) * x

  tau, _, x, v = draws(3)
  w = jnp.array([1.0, 2.0, 2.0])
  cond = {"label": jnp.array([4, 5, -1]), "guidance": w}
  guided, path = meanflow.guided_velocities(u, x, tau, v, cond, improved=False)
  np.testing.assert_allclose(guided[0], v[0])
  np.testing.assert_allclose(guided[1], 2 * v[1] - x[1])
  np.testing.assert_allclose(guided[2], v[2])
  np.testing.assert_array_equal(path, guided)
  guided, path = meanflow.guided_velocities(u, x, tau, v, cond, improved=True)
  np.testing.assert_allclose(guided[0], v[0])
  np.testing.assert_allclose(guided[1], v[1] + 0.5 * (6 * x[1] - x[1]))
  np.testing.assert_allclose(guided[2], v[2])
  np.testing.assert_allclose(path, u(x, tau, tau, cond))


def test_equal_times_are_flow_matching():
  # u - v is sigma_d (F - v_t / sigma_d) / h, where 1 / h is cos t + sin t.
  net, params = network()
  batch = {"x0": 0.5 * jax.random.normal(jax.random.key(1), (4000, *SHAPE)), "cond": {}}
  common = {"network": net, "sigma_d": SIGMA_D, "p_mean": -1.0, "p_std": 0.01}
  ours = meanflow.build(**common, diffusion_fraction=1.0, weight_power=0.0)

  def at_its_own_time(params, x, t, cond, *, key=None):
    return net.apply(params, x, t, trigflow.with_end_time(cond, t), key=key)

  common["network"] = net._replace(apply=at_its_own_time)
  expected = diffusion.build(**common, adaptive_weight=False, label_dropout=0.0)
  a, b = (
    jax.jit(loss)(params, batch, jax.random.key(3), jnp.int32(0), None)[0]
    for loss in (ours, expected)
  )
  t = np.arctan(np.exp(-1.0) / SIGMA_D)
  scale = (np.cos(t) + np.sin(t)) ** 2
  np.testing.assert_allclose(a, scale * b, rtol=0.03)


def test_times_are_sorted_and_equal_in_the_fraction_that_is_asked_for():
  tau, r = meanflow.sorted_times(
    jax.random.key(0),
    100_000,
    p_mean=-0.4 + np.log(0.3),
    p_std=1.0,
    sigma_d=0.3,
    diffusion_fraction=0.25,
  )
  assert bool(jnp.all(r <= tau))
  np.testing.assert_allclose(jnp.mean(r == tau), 0.25, atol=0.006)
  pairs = jnp.concatenate([tau[r < tau], r[r < tau]])
  logit = jnp.log(pairs / (1 - pairs))
  np.testing.assert_allclose(jnp.mean(logit), -0.4, atol=0.02)
  np.testing.assert_allclose(jnp.std(logit), 1.0, atol=0.02)


def test_the_weight_bounds_the_loss():
  net = Network(
    init=lambda key: jnp.float32(0.5),
    apply=lambda params, x, t, cond, *, key=None: 100 * params * x,
    logvar=lambda params, t: 0 * t,
  )
  batch = {"x0": jnp.ones((8, *SHAPE)), "cond": None}
  args = net.init(None), batch, jax.random.key(0), jnp.int32(0), None
  common = {"network": net, "sigma_d": SIGMA_D}
  value, metrics = meanflow.build(**common)(*args)
  assert metrics["mse"] > 100
  np.testing.assert_allclose(value, 1 / 6, rtol=1e-3)  # 1 / D
  plain, metrics = meanflow.build(**common, weight_power=0.0)(*args)
  np.testing.assert_allclose(plain, metrics["mse"], rtol=1e-6)


def test_names_and_mistakes():
  titles = {
    improved: losses.facts({"name": "meanflow", "improved": improved}).title
    for improved in (False, True)
  }
  assert titles == {False: "MeanFlow", True: "iMF"}
  with pytest.raises(ValueError, match=r"guidance=\(0\.5, 2\.0\): must be scales of"):
    meanflow.build(network=network()[0], sigma_d=SIGMA_D, guidance=(0.5, 2.0))
