"""What parallel samplers take, beside the sequential one."""

import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.samplers import (
  _gaussian_mixture,
  comparison,
  sampler,
  sequential,
  solvers,
)


def sweep(name, steps):
  table = solvers.build(sigma_d=0.5, name=name, steps=steps)
  keys = sequential.keys_from_seeds(np.arange(4))
  x = sequential.sample_prior(table, keys, (16,))
  net = _gaussian_mixture.denoiser(sigma_d=0.5)

  def bound(scale):
    return lambda x, t, cond: scale * net(x, t, cond)

  return table, comparison.sweep(bound, jnp.float32(1), table, x, keys, None)


def test_error_falls_and_passes_rise_with_the_tolerance():
  table, measure = sweep("ddim", 12)
  plan = sampler.from_tableau("para", table, window=6)
  exact, fine, rough = measure(plan, (0.0, 0.1, 3.0))
  assert exact.error < 1e-6 < fine.error < rough.error < 1
  assert 12 >= exact.passes > fine.passes > rough.passes >= 2
  assert fine.evaluations > fine.passes


@pytest.mark.parametrize("loop", ["", "para", "spec"])
def test_one_row_at_a_time_is_the_sequential_sampler(loop):
  table, measure = sweep("ddpm", 5)
  (taken,) = measure(sampler.from_tableau(loop, table, window=1), (0.1,))
  assert (taken.passes, taken.evaluations) == (5, 5)
  assert taken.error < 1e-6
