"""What is done for CPUs changes no value, and is done for them alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.distributed import sharding
from sdiff_jax.kernels import cpu

TREE = {"w": jnp.arange(24.0).reshape(2, 3, 4), "b": jnp.arange(4.0)}


def test_values_and_derivatives_are_those_of_the_arrays():
  def total(tree):
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(cpu.materialized(tree)))

  found = jax.jit(cpu.materialized)(TREE)
  assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(TREE)))
  gradients = jax.grad(total)(TREE)
  for name, x in TREE.items():
    np.testing.assert_array_equal(gradients[name], jnp.cos(x))
  _, tangent = jax.jvp(cpu.materialized, (TREE,), (TREE,))
  assert all(map(np.array_equal, jax.tree.leaves(tangent), jax.tree.leaves(TREE)))
  rows = jax.vmap(lambda x: cpu.materialized(x) + 1)(TREE["w"])
  np.testing.assert_array_equal(rows, TREE["w"] + 1)


def test_second_derivatives_are_those_of_the_function():
  def cube(x):
    return cpu.materialized(cpu.materialized(x) ** 3)

  assert jax.grad(jax.grad(cube))(2.0) == 12
  assert jax.jvp(jax.grad(cube), (2.0,), (1.0,)) == (12, 12)


@pytest.mark.parametrize(("platform", "calls"), [("cpu", 2), ("cuda", 0), ("tpu", 0)])
def test_cpus_alone_store_an_array_and_its_gradient(platform, calls):
  def loss(x):
    return jnp.sum(jnp.sin(cpu.materialized(jnp.sin(x))))

  for function, expected in ((jax.grad(loss), calls), (loss, 0)):
    traced = jax.jit(function).trace(jnp.ones(4))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count('inlineable = "false"') == expected


def filtered(x, w):
  return jax.lax.conv_general_dilated(
    x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def compiled_gradient(stored, options):
  """Returns the text of the program for the gradients of a filter of sin(x) x."""

  @functools.partial(jax.jit, compiler_options=options)
  def gradient(x, w, dy):
    def image(x, w):
      y = jnp.sin(x) * x
      return filtered(cpu.materialized(y) if stored else y, w)

    return jax.vjp(image, x, w)[1](dy)

  x = jnp.ones((8, 14, 14, 48))
  return gradient.lower(x, jnp.ones((3, 3, 48, 48)), x).compile().as_text()


@pytest.mark.parametrize("stored", [True, False])
def test_what_is_stored_is_not_computed_again_in_another_order(stored):
  """Without the call, XLA computes sines where it transposes them."""
  options = cpu.training_options(jax.devices("cpu")[0])
  computations = compiled_gradient(stored, options).split("\n}\n")
  both = [c for c in computations if " sine(" in c and " transpose(" in c]
  assert bool(both) != stored


def test_the_gradient_of_a_filter_is_not_given_to_ynnpack():
  options = cpu.training_options(jax.devices("cpu")[0])
  assert "__ynn_fusion" in compiled_gradient(True, {})
  assert "__ynn_fusion" not in compiled_gradient(True, options)


def test_rows_stay_on_their_devices():
  """A call that is not inlined has operands of the shards' size, and moves nothing."""
  mesh = sharding.make_mesh()
  x = jax.device_put(jnp.ones((2 * mesh.size, 8)), sharding.batch(mesh))
  f = jax.jit(jax.grad(lambda x: jnp.sum(jnp.cos(cpu.materialized(jnp.sin(x))))))
  text = f.lower(x).compile().as_text()
  assert re.search(r"f32\[2,8\]\S* call\(", text)
  assert "all-gather" not in text
  np.testing.assert_allclose(f(x), -jnp.sin(jnp.sin(1.0)) * jnp.cos(1.0), rtol=1e-6)
