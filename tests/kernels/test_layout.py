"""The order of axes in memory changes no value, and is asked for on GPUs alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.kernels.layout import gradient_in_row_major, row_major

TREE = {"w": jnp.arange(24.0).reshape(2, 3, 4), "b": jnp.arange(4.0)}


def test_values_and_derivatives_are_those_of_the_arrays():
  def total(tree):
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(row_major(tree)))

  out = jax.jit(row_major)(TREE)
  assert all(map(np.array_equal, jax.tree.leaves(out), jax.tree.leaves(TREE)))
  gradients = jax.grad(total)(TREE)
  for name, x in TREE.items():
    np.testing.assert_array_equal(gradients[name], jnp.cos(x))
  _, tangent = jax.jvp(row_major, (TREE,), (TREE,))
  assert all(map(np.array_equal, jax.tree.leaves(tangent), jax.tree.leaves(TREE)))


@pytest.mark.parametrize(("platform", "number"), [("cuda", 2), ("tpu", 0), ("cpu", 0)])
def test_only_gpus_are_told(platform, number):
  lowered = jax.jit(row_major).trace(TREE).lower(lowering_platforms=(platform,))
  assert lowered.as_text().count("@LayoutConstraint") == number


@pytest.mark.parametrize(("platform", "number"), [("cuda", 1), ("cpu", 0)])
def test_only_a_gradient_is_told(platform, number):
  x = jnp.arange(6.0).reshape(2, 3)

  @jax.jit
  def gradient(x):
    return jax.grad(lambda x: jnp.sum(gradient_in_row_major(x) ** 2))(x)

  np.testing.assert_array_equal(gradient(x), 2 * x)
  for f, expected in ((jax.jit(gradient_in_row_major), 0), (gradient, number)):
    lowered = f.trace(x).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("@LayoutConstraint") == expected
