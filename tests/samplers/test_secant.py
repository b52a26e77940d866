"""What a window knows of dd/dx, on data where it is known."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.samplers import _secant, paradigms, sequential, solvers

SIGMA_D = 0.5


def gaussian(variances):
  """Returns a Denoiser: E[x0 | x] of a centred Gaussian with a variance an element."""

  def denoiser(x, t, cond):
    c, s = jnp.cos(t)[:, None], SIGMA_D * jnp.sin(t)[:, None]
    v = jnp.asarray(variances, x.dtype)[None]
    return c * v / (c**2 * v + s**2) * x

  return denoiser


def window(variances, seen):
  """Returns a window of 4 rows, half of it seen before, its rows, and d."""
  rng = np.random.default_rng(0)
  table = solvers.build(sigma_d=SIGMA_D, name="ddim", steps=4)
  row = {k: jnp.float32(getattr(table, k))[None, :, None] for k in ("alpha", "gain")}
  x, before = (jnp.float32(rng.standard_normal((1, 4, 3))) for _ in range(2))
  times = jnp.float32(table.time)
  d = jnp.stack(
    [gaussian(variances)(x[:, i], times[i : i + 1], None) for i in range(4)]
  )
  d_before = jnp.stack(
    [gaussian(variances)(before[:, i], times[i : i + 1], None) for i in range(4)]
  )
  now = SimpleNamespace(
    x=x,
    before=(before, jnp.moveaxis(d_before, 0, 1)),
    seen=jnp.array([seen]),
    spread=jnp.ones((1, 1)),
  )
  return now, row, jnp.moveaxis(d, 0, 1), np.cos(table.time), table


def true_slope(cos, variances):
  alpha, v = cos[:, None], np.asarray(variances)
  return alpha * v / (alpha**2 * v + SIGMA_D**2 * (1 - alpha**2))


def test_states_seen_before_tell_the_slope_of_every_element():
  variances = (0.01, 0.1, 0.6)
  now, row, d, cos, _ = window(variances, seen=3)
  slope, _ = _secant.estimate_slopes(now, jnp.arange(4)[None], row, d)
  expected = true_slope(cos, variances)
  np.testing.assert_allclose(slope[0, :3], expected[:3], rtol=1e-4)


@pytest.mark.parametrize("variance", [0.01, 0.25, 0.9])
def test_new_states_take_the_variance_that_those_before_show(variance):
  now, row, d, cos, _ = window((variance,) * 3, seen=2)
  slope, spread = _secant.estimate_slopes(now, jnp.arange(4)[None], row, d)
  np.testing.assert_allclose(spread, variance / SIGMA_D**2, rtol=1e-3)
  # In this pass they still have the guess, in the next one what was found.
  np.testing.assert_allclose(slope[0, 2:], true_slope(cos, 3 * [0.25])[2:], rtol=1e-4)
  after = SimpleNamespace(**vars(now) | {"spread": spread, "seen": jnp.array([0])})
  slope, kept = _secant.estimate_slopes(after, jnp.arange(4)[None], row, d)
  np.testing.assert_allclose(slope[0], true_slope(cos, 3 * [variance]), rtol=1e-3)
  np.testing.assert_array_equal(kept, spread)


def test_bounds_and_states_that_did_not_change():
  now, row, _, _, table = window((0.1,) * 3, seen=4)
  for sign, bound in ((1e3, 1 / table.alpha), (-1e3, 0 * table.alpha)):
    d = now.before[1] + sign * (now.x - now.before[0])
    slope, spread = _secant.estimate_slopes(now, jnp.arange(4)[None], row, d)
    np.testing.assert_allclose(slope[0], np.float32(bound)[:, None] + np.zeros(3))
    assert 0 <= float(spread[0, 0]) <= _secant.MOST
  still = SimpleNamespace(**vars(now) | {"before": (now.x, now.before[1])})
  slope, spread = _secant.estimate_slopes(
    still, jnp.arange(4)[None], row, now.before[1]
  )
  np.testing.assert_allclose(slope[0], true_slope(np.cos(table.time), 3 * [0.25]), 1e-4)
  assert float(spread[0, 0]) == 1.0


@pytest.mark.parametrize(
  "name", ["ddim", "dpmpp2m", pytest.param("heun", marks=pytest.mark.slow)]
)
def test_data_whose_elements_are_independent_take_few_passes(name):
  """dd/dx is diagonal and constant: the second visit of a state ends its search."""
  table = solvers.build(sigma_d=SIGMA_D, name=name, steps=40)
  keys = sequential.keys_from_seeds(np.arange(3))
  x = sequential.sample_prior(table, keys, (8,))
  denoiser = gaussian(np.geomspace(1e-4, 1, 8))
  call = functools.partial(
    paradigms.sample, denoiser, table, window=table.evaluations, tolerance=1e-3
  )
  alone = jax.jit(functools.partial(sequential.sample, denoiser, table))(x, keys, None)
  found = jax.jit(call)(x, keys, None)
  np.testing.assert_allclose(found.x, alone, atol=1e-4)
  linear = jax.jit(functools.partial(call, update_rule="linear"))(x, keys, None)
  assert np.all(found.num_iterations <= 4)
  assert np.all(found.num_iterations < linear.num_iterations)
