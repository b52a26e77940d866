"""What parallel samplers take, beside the sequential one."""

import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax import samplers
from sdiff_jax.samplers import _gaussian_mixture, comparison


def sweep(name, steps):
  sampler = samplers.build(name, sigma_d=0.5, steps=steps)
  net = _gaussian_mixture.denoiser(sigma_d=0.5)

  def bound(scale):
    return lambda x, t, cond: scale * net(x, t, cond)

  return sampler, comparison.sweep(bound, jnp.float32(1), sampler, np.arange(4), (16,))


def test_error_falls_and_passes_rise_with_the_tolerance():
  sampler, measure = sweep("ddim", 12)
  parallel = samplers.from_tableau("paraddim", sampler.tableau, window=6)
  exact, fine, rough = measure(parallel, (0.0, 0.1, 3.0))
  assert exact.error < 1e-6 < fine.error < rough.error < 1
  assert 12 >= exact.num_iterations > fine.num_iterations > rough.num_iterations >= 2
  assert fine.num_evaluations > fine.num_iterations


@pytest.mark.parametrize("name", ["ddpm", "paraddpm", "specddpm"])
def test_one_step_at_a_time_is_the_sequential_sampler(name):
  sampler, measure = sweep("ddpm", 5)
  options = {} if name == "ddpm" else {"window": 1}
  (cost,) = measure(samplers.from_tableau(name, sampler.tableau, **options))
  assert (cost.num_iterations, cost.num_evaluations) == (5, 5)
  assert cost.error < 1e-6
