"""All states of a recurrence, as sequential and parallel loops record them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax import samplers
from sdiff_jax.samplers import paradigms, sequential, solvers
from sdiff_jax.samplers import sampler as sampler_lib


def exact(x, time, cond):
  """A denoiser that XLA rounds alike in every batch."""
  return x / (1 + jnp.abs(x) + time[:, None])


def states(name, steps=6, **options):
  sampler = samplers.build(name, sigma_d=0.5, steps=steps, **options)
  call = functools.partial(samplers.sample, sampler, exact, shape=(4,), record=True)
  return sampler, jax.jit(call)(jnp.arange(3))


@pytest.mark.parametrize(
  "solver",
  [
    pytest.param("ddim", marks=pytest.mark.slow),
    "heun",
    pytest.param("dpmpp2m", marks=pytest.mark.slow),
    "ddpm",
  ],
)
def test_parallel_states_are_the_sequential_ones_to_the_bit(solver, monkeypatch):
  monkeypatch.setattr(paradigms, "ULPS", 0)
  sampler, alone = states(solver)
  assert alone.states.shape == (3, sampler.num_steps + 1, 4)
  keys = sequential.keys_from_seeds(jnp.arange(3))
  prior = sequential.sample_prior(sampler.tableau, keys, (4,))
  np.testing.assert_array_equal(alone.states[:, 0], prior)
  np.testing.assert_array_equal(alone.states[:, -1], alone.x)
  plain = jax.jit(functools.partial(samplers.sample, sampler, exact, shape=(4,)))
  assert plain(jnp.arange(3)).states is None
  np.testing.assert_array_equal(plain(jnp.arange(3)).x, alone.x)
  _, parallel = states(f"para{solver}", window=4, tolerance=0.0)
  np.testing.assert_array_equal(parallel.states, alone.states)


@pytest.mark.slow
def test_states_of_a_tolerance_are_near_and_end_in_the_sample():
  _, alone = states("ddim", 30)
  _, parallel = states("paraddim", 30, window=12, tolerance=0.01)
  assert bool(jnp.all(parallel.num_iterations < 30))
  np.testing.assert_array_equal(parallel.states[:, -1], parallel.x)
  np.testing.assert_allclose(parallel.states, alone.states, atol=5e-3)
  assert bool(jnp.any(parallel.states != alone.states))


def test_speculative_states_are_draws_of_the_steps():
  # State i + 1 is Phi of state i and a normal number, which the states tell.
  sampler, samples = states("specddpm", 12, window=6)
  x = samples.states
  np.testing.assert_array_equal(x[:, -1], samples.x)
  assert bool(jnp.all(samples.num_iterations < 12))
  tableau, z = sampler.tableau, []
  for i in range(11):
    d = exact(x[:, i], jnp.full(3, tableau.time[i], jnp.float32), None)
    mean = tableau.x_coef[i, 0] * x[:, i] + tableau.denoised_coef[i, 0] * d
    z.append((x[:, i + 1] - mean) / tableau.noise_coef[i])
  z = np.asarray(jnp.stack(z))
  assert abs(z.mean()) < 4 / z.size**0.5
  assert 0.75 < z.std() < 1.25


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm2s", "dpmpp2m"])
def test_the_grid_has_the_times_between_the_steps_of_the_schedule(name):
  tableau = solvers.build(sigma_d=0.5, name=name, steps=5)
  assert len(tableau.grid) == 6
  assert np.all(np.diff(tableau.grid) < 0)
  assert tableau.grid[-1] == 0
  kept = tableau.of_grid(jnp.arange(tableau.evaluations + 1)[None])[0]
  two_stages = tableau.evaluations == 9
  assert kept.tolist() == ([0, 2, 4, 6, 8, 9] if two_stages else [0, 1, 2, 3, 4, 5])


def test_parareal_has_no_states_to_return():
  sampler = samplers.build("srdsddim", sigma_d=0.5, steps=4)
  with pytest.raises(ValueError, match="record: the sampler 'srdsddim' does not take"):
    sampler_lib.run(sampler, exact, jnp.ones((2, 4)), None, None, record=True)
