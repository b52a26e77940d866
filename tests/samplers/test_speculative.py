"""Speculative sampling has the distribution of the sequential sampler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from sdiff_jax.samplers import _gaussian_mixture, sequential, solvers, speculative


def energy_p_value(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
  """Returns the p-value of the two-sample energy test, by 200 permutations."""
  both = np.concatenate([x, y]).astype(np.float32)
  square = (both**2).sum(1)
  distance = np.sqrt(np.maximum(square[:, None] + square - 2 * both @ both.T, 0))
  n = len(x)

  def energy(order: np.ndarray) -> float:
    sign = np.where(order < n, 1.0, -1.0).astype(np.float32)
    return -float(sign @ distance @ sign)

  order = np.arange(len(both))
  mine = energy(order)
  others = [energy(rng.permutation(order)) for _ in range(200)]
  return (1 + sum(e >= mine for e in others)) / 201


def draws(name: str, window: int, seeds: np.ndarray, steps: int = 16) -> tuple:
  """Returns samples of the sequential sampler and of speculation, from other seeds."""
  table = solvers.build(sigma_d=0.5, name=name, steps=steps)
  denoiser = _gaussian_mixture.denoiser(0.5, dimensions=4)

  def start(seeds):
    keys = sequential.keys_from_seeds(seeds)
    return sequential.sample_prior(table, keys, (4,)), keys

  alone = jax.jit(functools.partial(sequential.sample, denoiser, table))
  x, keys = start(seeds)
  truth = alone(x, keys, None)
  x, keys = start(seeds + 10**6)
  call = functools.partial(speculative.run, denoiser, table, window=window)
  return np.asarray(truth), jax.jit(call)(x, keys, None)


@pytest.mark.parametrize(
  ("name", "window"),
  [("ddpm", 4), pytest.param("dpmpp2m_sde", 6, marks=pytest.mark.slow)],
)
def test_the_distribution_is_that_of_the_sequential_sampler(name, window):
  truth, found = draws(name, window, np.arange(4000))
  rng = np.random.default_rng(0)
  assert energy_p_value(truth, np.asarray(found.x), rng) > 0.01
  assert found.num_iterations.mean() < 16
  assert np.all(found.error == 0)


@pytest.mark.slow
def test_accepting_everything_is_caught(monkeypatch):
  couple = speculative.reflection_coupling

  def careless(*args):
    accepted, made = couple(*args)
    return jnp.ones_like(accepted), made

  monkeypatch.setattr(speculative, "reflection_coupling", careless)
  truth, found = draws("ddpm", 8, np.arange(4000))
  rng = np.random.default_rng(0)
  assert energy_p_value(truth, np.asarray(found.x), rng) < 0.01


def test_one_step_at_a_time_is_the_sequential_sampler():
  table = solvers.build(sigma_d=0.5, name="ddpm", steps=7)
  keys = sequential.keys_from_seeds(np.arange(3))
  x = sequential.sample_prior(table, keys, (4,))
  denoiser = _gaussian_mixture.denoiser(0.5, dimensions=4)
  alone = sequential.sample(denoiser, table, x, keys, None)
  found = speculative.run(denoiser, table, x, keys, None, window=1)
  np.testing.assert_allclose(found.x, alone, atol=1e-5)
  np.testing.assert_array_equal(found.num_iterations, 7)


def test_coupling_draws_from_the_target():
  """Moments of what comes of drafts around another mean."""
  count, s, mean, draft = 200_000, 0.7, np.array([0.3, -0.2]), np.array([-0.4, 0.1])
  rng = np.random.default_rng(1)
  z, u = rng.standard_normal((count, 1, 2)), rng.random((count, 1))
  accepted, made = speculative.reflection_coupling(
    jnp.float32(mean + s * z),
    jnp.float32(draft + s * z),
    jnp.full((count, 1, 1), s),
    jnp.float32(z),
    jnp.float32(u),
  )
  x = np.where(np.asarray(accepted)[..., None], draft + s * z, np.asarray(made))[:, 0]
  np.testing.assert_allclose(x.mean(0), mean, atol=0.01)
  np.testing.assert_allclose(np.cov(x.T), s**2 * np.eye(2), atol=0.01)
  # Reflection couples maximally: the fraction accepted is 1 - total variation.
  distance = np.linalg.norm(mean - draft) / s
  expected = 2 * (1 - ndtr(distance / 2))
  np.testing.assert_allclose(np.mean(accepted), expected, atol=0.005)


def test_solvers_without_noise_are_refused():
  table = solvers.build(sigma_d=0.5, name="ddim", steps=5)
  keys = sequential.keys_from_seeds(np.arange(1))
  denoiser = _gaussian_mixture.denoiser(0.5, dimensions=4)
  with pytest.raises(
    ValueError, match="noise in every step but the last, such as ddpm"
  ):
    speculative.run(denoiser, table, jnp.zeros((1, 4)), keys, None, window=2)
