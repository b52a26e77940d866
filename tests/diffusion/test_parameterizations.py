"""Every prediction of one Gaussian gives the same denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.diffusion import noise_schedules, parameterizations
from sdiff_jax.samplers import paradigms, sequential, solvers

STD = 0.6


def of_gaussian(kind, level):
  """Returns the best prediction for N(0, STD^2), in terms of E[x0 | x]."""

  def predict(x, time, cond):
    alpha, sigma = (v[:, None] for v in level(time))
    d = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * x
    eps = (x - alpha * d) / sigma
    return {"x0": d, "eps": eps, "v": alpha * eps - sigma * d, "flow": eps - d}[kind]

  return predict


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_predictions_of_a_discrete_process(kind):
  abar = noise_schedules.alphas_cumprod("linear", 100, end=0.2)
  level = parameterizations.vp(abar)
  time = jnp.array([0.0, 40.0, 99.0])
  alpha, sigma = level(time)
  np.testing.assert_allclose(alpha**2, abar[[0, 40, 99]], rtol=1e-5)
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)
  x = jnp.linspace(-2, 2, 12).reshape(3, 4)
  found = parameterizations.denoiser(of_gaussian(kind, level), kind, level)(
    x, time, None
  )
  gain = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
  np.testing.assert_allclose(found, gain[:, None] * x, rtol=1e-3, atol=1e-4)


def test_the_flow_velocity_samples_the_gaussian():
  table = solvers.from_schedule("ddim", noise_schedules.flow(np.linspace(1, 0, 201)))
  keys = sequential.keys_from_seeds(np.arange(2))
  x = sequential.sample_prior(table, keys, (4,))
  net = parameterizations.denoiser(
    of_gaussian("flow", parameterizations.flow), "flow", parameterizations.flow
  )
  found = sequential.sample(net, table, x, keys, None)
  np.testing.assert_allclose(found, STD * x, rtol=2e-2)
  result = paradigms.run(net, table, x, keys, None, window=50, tolerance=1e-2)
  np.testing.assert_allclose(result.x, found, atol=2e-3)
  assert np.all(result.num_iterations < 40)


def test_clipping():
  x = jnp.array([[0.5, -3.0, 2.0, 0.1], [0.2, -0.3, 0.1, 0.4]])
  level = lambda t: (jnp.ones_like(t), jnp.zeros_like(t))  # noqa: E731
  make = lambda **options: parameterizations.denoiser(  # noqa: E731
    lambda x, t, c: x, "x0", level, **options
  )(x, jnp.zeros(2), None)
  np.testing.assert_array_equal(make(), x)
  np.testing.assert_array_equal(make(clip=1.0), np.clip(x, -1, 1))
  dynamic = make(clip=1.0, quantile=0.75)
  most = np.quantile(np.abs(x[0]), 0.75)
  np.testing.assert_allclose(dynamic[0], np.clip(x[0], -most, most) / most, rtol=1e-6)
  np.testing.assert_allclose(dynamic[1], x[1])  # within the range already


def test_mistakes_are_refused():
  with pytest.raises(ValueError, match=r"kind='score': must be one of x0, eps"):
    parameterizations.denoiser(jax.nn.relu, "score", parameterizations.flow)
  with pytest.raises(ValueError, match=r"quantile=0\.9: needs clip, the range"):
    parameterizations.denoiser(jax.nn.relu, "eps", parameterizations.flow, quantile=0.9)
