"""Estimates of dd/dx in a window, on data with a known derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.samplers import _secant, paradigms, sequential, solvers
from sdiff_jax.samplers._secant import Secants

SIGMA_D = 0.5


def gaussian(variances):
  """Returns a Denoiser: E[x0 | x] of a centred Gaussian with a variance an element."""

  def denoiser(x, t, cond):
    c, s = jnp.cos(t)[:, None], SIGMA_D * jnp.sin(t)[:, None]
    v = jnp.asarray(variances, x.dtype)[None]
    return c * v / (c**2 * v + s**2) * x

  return denoiser


def window(variances, seen):
  """Returns secants, the states and d of a window of 4 steps, and their coefficients."""
  rng = np.random.default_rng(0)
  table = solvers.build(sigma_d=SIGMA_D, name="ddim", steps=4)
  columns = table.coefficients(jnp.float32)
  step = jax.tree.map(lambda column: column[None, :, None], columns)
  x, before = (jnp.float32(rng.standard_normal((1, 4, 3))) for _ in range(2))
  times = jnp.float32(table.time)
  d = jnp.stack(
    [gaussian(variances)(x[:, i], times[i : i + 1], None) for i in range(4)]
  )
  d_before = jnp.stack(
    [gaussian(variances)(before[:, i], times[i : i + 1], None) for i in range(4)]
  )
  d, d_before = (jnp.moveaxis(v, 0, 1) for v in (d, d_before))
  secants = Secants(before, d_before, jnp.array([seen]), jnp.ones((1, 1)))
  return secants, x, d, step, table


def estimate(secants, x, d, step):
  return _secant.estimate_slopes(secants, x, d, jnp.arange(4)[None], step)


def true_slope(cos, variances):
  alpha, v = cos[:, None], np.asarray(variances)
  return alpha * v / (alpha**2 * v + SIGMA_D**2 * (1 - alpha**2))


def test_states_seen_before_tell_the_slope_of_every_element():
  variances = (0.01, 0.1, 0.6)
  *args, table = window(variances, seen=3)
  slope, _ = estimate(*args)
  expected = true_slope(np.cos(table.time), variances)
  np.testing.assert_allclose(slope[0, :3], expected[:3], rtol=1e-4)


@pytest.mark.parametrize("variance", [0.01, 0.25, 0.9])
def test_new_states_take_the_variance_that_those_before_show(variance):
  secants, x, d, step, table = window((variance,) * 3, seen=2)
  cos = np.cos(table.time)
  slope, ratio = estimate(secants, x, d, step)
  np.testing.assert_allclose(ratio, variance / SIGMA_D**2, rtol=1e-3)
  # In this iteration they still have the guess, in the next one the estimate.
  np.testing.assert_allclose(slope[0, 2:], true_slope(cos, 3 * [0.25])[2:], rtol=1e-4)
  after = secants._replace(variance_ratio=ratio, num_seen=jnp.array([0]))
  slope, kept = estimate(after, x, d, step)
  np.testing.assert_allclose(slope[0], true_slope(cos, 3 * [variance]), rtol=1e-3)
  np.testing.assert_array_equal(kept, ratio)


def test_bounds_and_states_that_did_not_change():
  secants, x, _, step, table = window((0.1,) * 3, seen=4)
  for sign, bound in ((1e3, 1 / table.alpha), (-1e3, 0 * table.alpha)):
    d = secants.denoised + sign * (x - secants.x)
    slope, ratio = estimate(secants, x, d, step)
    np.testing.assert_allclose(slope[0], np.float32(bound)[:, None] + np.zeros(3))
    assert 0 <= float(ratio[0, 0]) <= _secant.MAX_RATIO
  slope, ratio = estimate(secants._replace(x=x), x, secants.denoised, step)
  np.testing.assert_allclose(slope[0], true_slope(np.cos(table.time), 3 * [0.25]), 1e-4)
  assert float(ratio[0, 0]) == 1.0


@pytest.mark.parametrize(
  "name",
  [
    "ddim",
    pytest.param("dpmpp2m", marks=pytest.mark.slow),
    pytest.param("heun", marks=pytest.mark.slow),
  ],
)
def test_data_whose_elements_are_independent_need_few_iterations(name):
  """dd/dx is diagonal and constant: the second visit of a state ends its search."""
  table = solvers.build(sigma_d=SIGMA_D, name=name, steps=40)
  keys = sequential.keys_from_seeds(np.arange(3))
  x = sequential.sample_prior(table, keys, (8,))
  denoiser = gaussian(np.geomspace(1e-4, 1, 8))
  call = functools.partial(
    paradigms.run, denoiser, table, window=table.evaluations, tolerance=1e-3
  )
  alone = jax.jit(functools.partial(sequential.sample, denoiser, table))(x, keys, None)
  found = jax.jit(call)(x, keys, None)
  np.testing.assert_allclose(found.x, alone, atol=1e-4)
  linear = jax.jit(functools.partial(call, update_rule="linear"))(x, keys, None)
  assert np.all(found.num_iterations <= 4)
  assert np.all(found.num_iterations < linear.num_iterations)
