"""The discrete tangent against differences of f, and its limit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import random_params
from scipy.stats import norm

from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.losses import ConsistencyOptions, scm, scm_discrete
from sdiff_jax.models import mlp
from sdiff_jax.types import Network

SIGMA_D = 0.6
x64 = pytest.mark.usefixtures("x64")


def case():
  rng = np.random.default_rng(0)
  xt, v = rng.normal(size=(2, 5, 3))
  network = mlp.build(shape=(3,), cond={}, width=8, depth=1, dtype="float64")
  net = functools.partial(network.apply, random_params(network))
  return net, jnp.asarray(xt), jnp.asarray(rng.uniform(0.2, 1.5, 5)), jnp.asarray(v)


@x64
@pytest.mark.parametrize("gap", [0.15, 1e-3])
def test_it_is_the_difference_of_f(gap):
  net, xt, t, v = case()
  f = trigflow.denoiser(net, SIGMA_D)
  xs = trigflow.rotate(xt, v / SIGMA_D, t, t - gap, SIGMA_D)
  rise = (f(xt, t, None) - f(xs, t - gap, None)) / np.sin(gap)
  F, g = scm_discrete.tangent(net, xt, t, v, None, sigma_d=SIGMA_D, s=t - gap)
  expected = trigflow.expand(jnp.cos(t), xt) * rise
  np.testing.assert_allclose(g, expected, rtol=1e-9, atol=1e-11)
  np.testing.assert_allclose(F, net(xt / SIGMA_D, t, None), rtol=1e-12)


@x64
@pytest.mark.parametrize("r", [pytest.param(0.0, marks=pytest.mark.slow), 0.4, 1.0])
def test_it_tends_to_the_tangent_linearly(r):
  net, xt, t, v = case()
  options = {"sigma_d": SIGMA_D, "r": r}
  _, g = scm.tangent(net, xt, t, v, None, **options)

  def off(gap):
    near = scm_discrete.tangent(net, xt, t, v, None, s=t - gap, **options)[1]
    return float(jnp.linalg.norm(near - g))

  errors = np.array([off(gap) for gap in (4e-4, 2e-4, 1e-4)])
  np.testing.assert_allclose(errors[1:] / errors[:-1], 0.5, atol=0.01)


def drawn(monkeypatch, n, batch):
  """Returns the angles of a loss with n levels."""
  calls = []

  def spy(net, xt, t, v, cond, *, s, **options):
    calls.append((np.asarray(t), np.asarray(s)))
    return xt, xt

  monkeypatch.setattr(scm_discrete, "tangent", spy)
  loss = scm_discrete.build(
    network=Network(init=len, apply=len, logvar=len),
    sigma_d=SIGMA_D,
    velocity="data",
    n=n,
    options=ConsistencyOptions(adaptive_weight=False),
  )
  data = {"x0": jnp.zeros((batch, 1)), "cond": None}
  loss(None, data, jax.random.key(1), jnp.int32(0), None)
  return calls[0]


def test_levels_are_drawn_with_the_mass_of_their_cells(monkeypatch):
  t, s = drawn(monkeypatch, 6, 20_000)
  sigma = time_grids.karras(6)[::-1]  # 0, 0.002, ..., 80
  grid = np.arctan(sigma / SIGMA_D).astype("float32")
  i = np.searchsorted(grid, t)
  np.testing.assert_array_equal(t, grid[i])
  np.testing.assert_array_equal(s, grid[i - 1])
  edges = norm.cdf(np.log(np.maximum(sigma, 1e-30)), -1.0, 1.4)
  edges[-1] = 1
  share = np.bincount(i, minlength=7)[1:] / len(t)
  np.testing.assert_allclose(share, np.diff(edges), atol=0.01)
  assert (share[:5] > 0).sum() >= 3


def test_a_grid_of_one_level_is_refused():
  with pytest.raises(ValueError, match=r"^n=1: must be from 2 to 1000000"):
    scm_discrete.build(network=None, teacher=None, sigma_d=0.5, n=1)
