"""The Lagrangian residual: closed forms, finite differences, and where gradients flow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian, central, random_params

from sdiff_jax.diffusion import trigflow
from sdiff_jax.losses import lagrangian
from sdiff_jax.models import mlp
from sdiff_jax.types import CondSpec

SIGMA_D = 0.5
SHAPE = (2, 3)
END_TIME = {trigflow.END_TIME: CondSpec((), "float32")}
x64 = pytest.mark.usefixtures("x64")


def draws(batch: int = 6):
  rng = np.random.default_rng(0)
  t = rng.uniform(0.2, 1.5, batch)
  s = t * rng.uniform(0.0, 0.9, batch)
  return (jnp.asarray(a) for a in (t, s, rng.normal(size=(batch, *SHAPE))))


@functools.cache
def network(dtype: str = "float64"):
  net = mlp.build(shape=SHAPE, width=16, depth=2, cond=END_TIME, dtype=dtype)
  return net, random_params(net, dtype=dtype)


@x64
@pytest.mark.parametrize("std", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("own", [False, True])
def test_the_residual_vanishes_at_the_true_map(std, own):
  data = Gaussian(jnp.float64(0.1), jnp.float64(std), SIGMA_D)
  t, s, xt = draws()
  net = data.flow_map_net
  at_s = trigflow.with_end_time(None, s)

  def velocity(x):
    return SIGMA_D * net(x / SIGMA_D, s, at_s) if own else data.velocity(x, s)

  residual = functools.partial(lagrangian.residual, sigma_d=SIGMA_D)
  assert float(jnp.max(jnp.abs(residual(net, xt, t, s, velocity, None)))) < 1e-9
  wrong = residual(net, xt, t, s, lambda x: velocity(x) + 0.1, None)
  np.testing.assert_allclose(wrong, -0.1, atol=1e-9)


@x64
def test_the_residual_is_a_finite_difference_less_the_velocity_at_its_end():
  net, params = network()
  net = functools.partial(net.apply, params)
  t, s, xt = draws()

  def state(s):
    F = net(xt / SIGMA_D, t, trigflow.with_end_time(None, s))
    return trigflow.rotate(xt, F, t, s, SIGMA_D)

  slope = central(state, (s,), (jnp.ones_like(s),))
  error = lagrangian.residual(net, xt, t, s, jnp.sin, None, sigma_d=SIGMA_D)
  np.testing.assert_allclose(error, slope - jnp.sin(state(s)), rtol=1e-6, atol=1e-7)


@x64
def test_gradients_flow_through_the_slope_alone():
  net, params = network()
  t, s, xt = draws()
  at_s = trigflow.with_end_time(None, s)

  def error(params, constant):
    bound = functools.partial(net.apply, params)
    own = functools.partial(net.apply, constant)
    return lagrangian.residual(
      bound, xt, t, s, lambda x: own(x, s, at_s), None, sigma_d=SIGMA_D
    )

  def with_own_velocity(params):
    return jnp.sum(error(params, params) ** 2)

  def with_constant_velocity(p):
    return jnp.sum(error(p, params) ** 2)

  gradients = (
    jax.jit(jax.grad(f))(params) for f in (with_own_velocity, with_constant_velocity)
  )
  for ours, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_equal_times_regress_on_the_velocity_of_the_data():
  data = Gaussian(jnp.float32(0.0), jnp.float32(0.9), SIGMA_D)
  net = network("float32")[0]._replace(
    apply=lambda params, x, t, cond, *, key=None: params * data.flow_map_net(x, t, cond)
  )
  batch = {"x0": 0.9 * jax.random.normal(jax.random.key(1), (4000, 1)), "cond": {}}
  loss = lagrangian.build(
    network=net, sigma_d=SIGMA_D, velocity="data", diffusion_fraction=1.0
  )

  def value(scale):
    return loss(scale, batch, jax.random.key(0), jnp.int32(0), None)[0]

  value, slope = jax.value_and_grad(value)(jnp.float32(1.0))
  assert value > 0.05  # the variance of the data's velocity
  assert abs(slope) < 0.02  # and the true map is its minimum


def test_mistakes():
  common = {"network": network()[0], "sigma_d": SIGMA_D}
  with pytest.raises(ValueError, match=r"diffusion_fraction=0: must be above 0"):
    lagrangian.build(**common, velocity="data", diffusion_fraction=0.0)
  with pytest.raises(ValueError, match=r"velocity='teacher': needs a teacher"):
    lagrangian.build(**common)
  with pytest.raises(ValueError, match=r"diffusion_fraction=0\.8: must be at most"):
    lagrangian.build(**common, diffusion_fraction=0.8, consistency_fraction=0.3)
