"""Rectified flow is TrigFlow in other variables, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian

from sdiff_jax.diffusion import rectified_flow, trigflow

SIGMA_D = 0.5
pytestmark = pytest.mark.usefixtures("x64")


def draws(batch: int = 6):
  rng = np.random.default_rng(0)
  tau = rng.uniform(0.05, 0.99, batch)
  r = tau * rng.uniform(0.0, 0.95, batch)
  x0, z = rng.normal(size=(2, batch, 3))
  return (jnp.asarray(a) for a in (tau, r, x0, SIGMA_D * z))


def test_times_and_states_are_those_of_trigflow():
  tau, _, x0, z = draws()
  t = rectified_flow.angle(tau)
  np.testing.assert_allclose(rectified_flow.time(t), tau, rtol=1e-14)
  x = rectified_flow.perturb(x0, z, tau)
  np.testing.assert_allclose(
    rectified_flow.to_trigflow(x, tau), trigflow.perturb(x0, z, t), atol=1e-14
  )
  v = rectified_flow.velocity(trigflow.velocity(x0, z, t), x, tau)
  np.testing.assert_allclose(v, z - x0, atol=1e-14)


def test_a_step_along_the_average_velocity_is_that_of_the_flow_map():
  tau, r, x0, z = draws()
  x = rectified_flow.perturb(x0, z, tau)

  def net(x, t, cond):  # any network
    return jnp.sin(3 * x) * trigflow.expand(t + cond["end_time"] ** 2, x)

  u = rectified_flow.average_velocity(net, SIGMA_D)(x, tau, r, None)
  t, s = rectified_flow.angle(tau), rectified_flow.angle(r)
  xt = rectified_flow.to_trigflow(x, tau)
  F = net(xt / SIGMA_D, t, trigflow.with_end_time(None, s))
  end = rectified_flow.to_trigflow(x - trigflow.expand(tau - r, x) * u, r)
  expected = trigflow.rotate(xt, F, t, s, SIGMA_D)
  np.testing.assert_allclose(end, expected, atol=1e-13)


def test_the_average_velocity_is_finite_at_both_ends():
  data = Gaussian(jnp.float64(0.1), jnp.float64(0.9), SIGMA_D)
  u = rectified_flow.average_velocity(data.flow_map_net, SIGMA_D)
  tau = jnp.array([0.0, 1.0, 1.0])
  values = u(jnp.ones((3, 2)), tau, jnp.array([0.0, 0.0, 1.0]), None)
  assert np.isfinite(values).all()
