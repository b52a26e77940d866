"""What parallel samplers take, beside the sequential one."""

import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.samplers import comparison, mixture, plans, sequential, tables


def sweep(name, steps):
  table = tables.build(sigma_d=0.5, name=name, steps=steps)
  keys = sequential.keys_of(np.arange(4))
  x = sequential.initial(table, keys, (16,))
  net = mixture.denoiser(sigma_d=0.5)

  def bound(scale):
    return lambda x, t, cond: scale * net(x, t, cond)

  return table, comparison.sweep(bound, jnp.float32(1), table, x, keys, None)


def test_error_falls_and_passes_rise_with_the_tolerance():
  table, measure = sweep("ddim", 12)
  plan = plans.of_table("para", table, window=6)
  exact, fine, rough = measure(plan, (0.0, 0.1, 3.0))
  assert exact.error < 1e-6 < fine.error < rough.error < 1
  assert 12 >= exact.passes > fine.passes > rough.passes >= 2
  assert fine.evaluations > fine.passes


@pytest.mark.parametrize("loop", ["", "para", "spec"])
def test_one_row_at_a_time_is_the_sequential_sampler(loop):
  table, measure = sweep("ddpm", 5)
  (taken,) = measure(plans.of_table(loop, table, window=1), (0.1,))
  assert (taken.passes, taken.evaluations) == (5, 5)
  assert taken.error < 1e-6
