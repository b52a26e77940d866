"""DDPM's objective: the error of the noise, whatever the network predicts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.diffusion import noise_schedules, trigflow
from sdiff_jax.losses import ddpm
from sdiff_jax.models.layers import linen as networks
from sdiff_jax.types import Network

ABAR = noise_schedules.alphas_cumprod("cosine", 100)


def noise_net(sigma_d: float, seen: list) -> Network:
  """A network of noise at timesteps, eps_hat = params x + time / 10, as TrigFlow's."""

  def apply(params, x, time, cond, *, key=None):
    eps = params * x + trigflow.expand(time, x) / 10
    seen.append((x, time, eps, cond))
    return eps

  inner = Network(lambda key: None, apply, lambda params, t: t)
  return networks.trigflow_from_ddpm(inner, sigma_d, ABAR)


@pytest.mark.parametrize("sigma_d", [1.0, 0.5])
def test_value_is_the_error_of_the_noise(key, monkeypatch, sigma_d):
  """Of x' = alpha x0 + sigma eps at whole timesteps, none left out."""
  seen, drawn, normal = [], [], jax.random.normal

  def spy(*args):
    drawn.append(normal(*args))
    return drawn[-1]

  monkeypatch.setattr(jax.random, "normal", spy)
  loss = ddpm.build(network=noise_net(sigma_d, seen), sigma_d=sigma_d)
  x0 = sigma_d * normal(jax.random.key(3), (2000, 4, 2))
  batch = {"x0": x0, "cond": {"observation": jnp.ones((2000, 3))}}
  value, aux = loss(jnp.float32(0.3), batch, key, jnp.int32(0), None)
  ((x, time, eps_hat, cond),), (eps,) = seen, drawn
  n = np.round(time).astype(int)
  np.testing.assert_allclose(time, n, atol=2e-3)
  assert set(n.tolist()) == set(range(100))
  alpha, sigma = ((a[n] ** 0.5)[:, None, None] for a in (ABAR, 1 - ABAR))
  np.testing.assert_allclose(x, alpha * x0 + sigma * eps, atol=1e-5)
  wanted = np.mean(np.square(eps - eps_hat))
  assert float(value) == pytest.approx(float(wanted), rel=1e-5)
  assert float(aux["mse"]) == float(value)
  assert cond is batch["cond"]


def test_gradient_is_that_of_the_noise(key):
  """In the network's one parameter, by differences."""
  loss = ddpm.build(network=noise_net(1.0, []), sigma_d=1.0)
  x0 = jax.random.normal(jax.random.key(3), (64, 4, 2))
  batch = {"x0": x0, "cond": None}
  value = functools.partial(loss, batch=batch, key=key, step=jnp.int32(0), frozen=None)
  found = jax.grad(lambda p: value(p)[0])(jnp.float32(0.3))
  high, low = (value(jnp.float32(0.3 + d))[0] for d in (0.01, -0.01))
  assert float(found) == pytest.approx(float(high - low) / 0.02, rel=1e-2)
  assert abs(float(found)) > 0.1
