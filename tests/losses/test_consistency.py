"""The predecessors: EDM's f, its pairs of levels, and the metric."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian
from scipy.stats import truncnorm

from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.losses import consistency
from sdiff_jax.types import Network

SIGMA_D = 0.5
x64 = pytest.mark.usefixtures("x64")
DATA = Gaussian(0.3, 0.8, SIGMA_D)


def as_network(net) -> Network:
  return Network(
    init=lambda key: None,
    apply=lambda params, x, t, cond, *, key=None: net(x, t, cond),
    logvar=lambda params, t: 0 * t,
  )


def swirl(x, t, cond=None):
  return jnp.sin(3 * x) + trigflow.expand(t, x)


def test_f_is_the_identity_at_the_least_noise():
  x = jnp.array([[0.2, -1.0], [3.0, 0.5]])
  f = consistency.consistency(
    swirl, x, jnp.full(2, time_grids.SIGMA_MIN), None, sigma_d=SIGMA_D
  )
  np.testing.assert_array_equal(f, x)


@x64
def test_f_is_that_of_trigflow_but_for_the_least_noise():
  """With c_skip, c_out of EDM's table 1 and EDM's F; they differ by O(eps)."""
  x, sigma = jnp.array([[0.2, -1.0], [30.0, 5.0]]), jnp.array([0.7, 40.0])
  t = jnp.arctan(sigma / SIGMA_D)
  xt = x * jnp.cos(t)[:, None]
  expected = trigflow.denoiser(swirl, SIGMA_D)(xt, t, None)
  found = consistency.consistency(swirl, x, sigma, None, sigma_d=SIGMA_D)
  np.testing.assert_allclose(found, expected, rtol=0, atol=0.02)
  assert np.max(np.abs(found - expected)) > 1e-5


@pytest.mark.parametrize("n", [3, 1280])
def test_pairs_are_neighbors_with_the_mass_between_them(n):
  above, below = consistency.adjacent_times(
    jax.random.key(0), 20_000, jnp.int32(n), p_mean=-1.1, p_std=2.0
  )
  sigma = time_grids.karras(n + 1)[-2::-1]
  i = np.argmin(np.abs(np.log(sigma[1:]) - np.log(np.asarray(above))[:, None]), 1)
  np.testing.assert_allclose(above, sigma[i + 1], rtol=1e-5)
  np.testing.assert_allclose(below, sigma[i], rtol=1e-5)
  low, high = ((math.log(s) + 1.1) / 2.0 for s in (0.002, 80.0))
  mass = np.diff(truncnorm.cdf((np.log(sigma) + 1.1) / 2.0, low, high))
  share = np.bincount(i, minlength=n) / len(i)
  np.testing.assert_allclose(share, mass, atol=0.01)


@pytest.fixture
def seen(monkeypatch):
  calls, real = [], consistency.consistency

  def spy(net, x, sigma, cond, **options):
    calls.append((x, sigma))
    return real(net, x, sigma, cond, **options)

  monkeypatch.setattr(consistency, "consistency", spy)
  return calls


def run(net, *, step=0, batch=64, **options):
  defaults = {"teacher": lambda frozen, x, t, cond: DATA.diffusion_net(x, t)}
  loss = consistency.build(
    network=as_network(net), sigma_d=SIGMA_D, **defaults | options
  )
  rng = np.random.default_rng(0)
  x0 = jnp.asarray(DATA.mean + DATA.std * rng.normal(size=(batch, 2)), "float32")
  data = {"x0": x0, "cond": None}
  return loss(None, data, jax.random.key(1), jnp.int32(step), None), x0


def test_the_value_by_hand(seen):
  """Along the data's velocity the lower state has the same noise."""
  (value, aux), x0 = run(swirl, velocity="data", levels=(5, 5))
  (x, sigma), (y, lower) = seen
  noise = (x - x0) / np.asarray(sigma)[:, None]
  assert np.std(noise) == pytest.approx(1, abs=0.15)
  np.testing.assert_allclose(y, x0 + lower[:, None] * noise, rtol=1e-3, atol=1e-4)
  change = [
    consistency.consistency(swirl, a, s, None, sigma_d=SIGMA_D)
    for a, s in ((x, sigma), (y, lower))
  ]
  square = np.sum(np.square(change[0] - change[1]), 1)
  C = 0.00054 * 2**0.5
  expected = np.mean((np.sqrt(square + C**2) - C) / (sigma - lower))
  assert float(value) == pytest.approx(float(expected), rel=1e-5)
  assert float(aux["mse"]) == pytest.approx(float(np.mean(square) / 2), rel=1e-5)


def test_no_gradient_through_the_lower_state():
  """d/da of |a h(x) - sg(a h(y))| keeps h(x) alone."""

  def value(a):
    def net(x, t, cond):
      return a * swirl(x, t)

    return run(net, velocity="data", levels=(5, 5))[0][0]

  def both(a, fixed):
    def f(x, sigma, scale):
      def net(x, t, cond):
        return scale * swirl(x, t)

      return consistency.consistency(net, x, sigma, None, sigma_d=SIGMA_D)

    change = f(x, sigma, a) - f(y, lower, fixed)
    C = 0.00054 * 2**0.5
    distance = jnp.sqrt(jnp.sum(change**2, 1) + C**2) - C
    return jnp.mean(distance / (sigma - lower))

  calls, real = [], consistency.consistency
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      consistency,
      "consistency",
      lambda net, x, s, cond, **o: calls.append((x, s)) or real(net, x, s, cond, **o),
    )
    value(1.3)
  (x, sigma), (y, lower) = calls
  assert jax.grad(value)(1.3) == pytest.approx(
    float(jax.grad(both)(1.3, 1.3)), rel=1e-4
  )


@x64
def test_distillation_is_of_third_order_at_the_true_function():
  """One step of Heun's is off by the third power of its size, so is f of it."""

  def true(x, t, cond):
    # In float64, where the loss draws in float32.
    F = DATA.consistency_net(x.astype("float64"), t.astype("float64"))
    return F.astype(x.dtype)

  mses = [
    float(run(true, velocity="teacher", levels=(n, n), batch=256)[0][1]["mse"])
    for n in (8, 16, 32)
  ]
  ratios = np.divide(mses[:-1], mses[1:])
  print(ratios)
  np.testing.assert_allclose(ratios, 2**6, rtol=0.5)


def test_the_grid_doubles_up_to_its_last():
  found = [
    int(
      run(swirl, velocity="data", levels=(10, 50), double_every=100, step=s)[0][1][
        "levels"
      ]
    )
    for s in (0, 99, 100, 250, 300, 10**6)
  ]
  assert found == [10, 10, 20, 40, 50, 50]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"levels": (20, 10)}, r"^levels=\(20, 10\): must not decrease"),
    ({"double_every": 0}, r"^double_every=0: must be at least 1"),
    ({"velocity": "both"}, r"^velocity='both': must be"),
  ],
)
def test_mistakes_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    run(swirl, **options)
