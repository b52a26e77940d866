"""Consistency functions to the lower end of a segment: multi-step sCD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian, central, random_params

from sdiff_jax.diffusion import trigflow
from sdiff_jax.losses import ConsistencyOptions, scm
from sdiff_jax.models import mlp
from sdiff_jax.samplers import sequential, solvers
from sdiff_jax.types import Network

SIGMA_D = 0.6
x64 = pytest.mark.usefixtures("x64")
DATA = Gaussian(0.3, 0.8, SIGMA_D)


def flow_net(ends):
  """Returns F of the probability flow's map to the segment's lower end, as a NetFn."""

  def net(x, t, cond=None):
    s = jnp.asarray(ends)[jnp.searchsorted(jnp.asarray(ends), t, side="left") - 1]
    u = trigflow.expand(t - s, x)
    xt = x * SIGMA_D
    return (jnp.cos(u) * xt - DATA.flow(xt, t, s)) / (SIGMA_D * jnp.sin(u))

  return net


def states():
  rng = np.random.default_rng(0)
  xt, v = rng.normal(size=(2, 6, 2))
  t = rng.uniform(0.9, 1.5, 6)
  return jnp.asarray(xt), jnp.asarray(t), jnp.asarray(v), jnp.asarray(t * 0.6)


@x64
def test_tangent_is_the_derivative_of_f_to_s():
  xt, t, v, s = states()
  network = mlp.build(shape=(2,), cond={}, width=8, depth=1, dtype="float64")
  params = random_params(network)

  def net(x, t, cond=None):
    return network.apply(params, x, t, None)

  def f(xt, t):
    return trigflow.rotate(xt, net(xt / SIGMA_D, t), t, s, SIGMA_D)

  slope = central(f, (xt, t), (v, jnp.ones_like(t)))
  _, g = scm.tangent(net, xt, t, v, None, sigma_d=SIGMA_D, s=s)
  np.testing.assert_allclose(
    g, trigflow.expand(jnp.cos(t - s), xt) * slope, rtol=1e-6, atol=1e-8
  )
  # At s = t it is flow matching.
  F, g = scm.tangent(net, xt, t, v, None, sigma_d=SIGMA_D, s=t)
  np.testing.assert_allclose(g, v - SIGMA_D * F, rtol=1e-12)


@x64
def test_tangent_vanishes_at_the_flow():
  xt, t, _, _ = states()
  ends = np.array([0.0, 0.8])
  v = DATA.velocity(xt, t)
  _, g = scm.tangent(flow_net(ends), xt, t, v, None, sigma_d=SIGMA_D, s=0.8)
  np.testing.assert_allclose(g, 0, atol=1e-10)
  _, g = scm.tangent(flow_net(ends), xt, t, v, None, sigma_d=SIGMA_D, s=0.7)
  assert jnp.max(jnp.abs(g)) > 1e-2


@x64
def test_ddim_from_end_to_end_samples_it():
  """Each step of DDIM is one evaluation of f, so the ends are on the flow."""
  angles = (1.5, 1.0, 0.4)
  ends = np.array([0.0, 0.4, 1.0])
  table = solvers.build(sigma_d=SIGMA_D, name="ddim", steps=3, timesteps=angles)
  xt = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)))
  keys = sequential.keys_from_seeds(np.arange(4))
  denoiser = trigflow.denoiser(flow_net(ends), SIGMA_D)
  found = sequential.sample(denoiser, table, xt, keys, None)
  expected = DATA.flow(xt, jnp.full(4, 1.5), jnp.zeros(4))
  np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_each_angle_gets_the_lower_end_of_its_segment(monkeypatch):
  calls = []

  def spy(net, xt, t, v, cond, *, s, **options):
    calls.append((t, s))
    return xt, xt

  monkeypatch.setattr(scm, "tangent", spy)
  loss = scm.build(
    network=Network(init=len, apply=len, logvar=len),
    sigma_d=SIGMA_D,
    velocity="data",
    segment_boundaries=(0.9, 0.3),
    options=ConsistencyOptions(adaptive_weight=False),
  )
  batch = {"x0": jnp.zeros((300, 2)), "cond": None}
  loss(None, batch, jax.random.key(1), jnp.int32(0), None)
  ((t, s),) = calls
  expected = np.where(t >= 0.9, 0.9, np.where(t >= 0.3, 0.3, 0)).astype("float32")
  np.testing.assert_array_equal(s, expected)
  assert len(np.unique(s)) == 3


def test_an_end_outside_is_refused():
  with pytest.raises(
    ValueError, match=r"^segment_boundaries=\(1\.6,\): must be a tuple of numbers, each"
  ):
    scm.build(network=None, teacher=None, sigma_d=0.5, segment_boundaries=(1.6,))
