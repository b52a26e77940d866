"""Layers that keep magnitudes: derivatives of the norm, weights and products in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.models.layers import magnitude_preserving as mp

x64 = pytest.mark.usefixtures("x64")


@x64
def test_the_derivative_of_the_norm_is_that_of_its_formula():
  """In forward and reverse mode and of second order, as automatic differentiation has it."""
  x, dx, g = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5, 4)))

  def formula(x):
    return x / (jnp.sqrt(jnp.mean(x**2, (0, 1), keepdims=True)) + mp.EPS)

  @functools.partial(jax.jit, static_argnums=0)
  def derivatives(f):
    tangent = jax.jvp(f, (x,), (dx,))[1]
    second = jax.grad(lambda x: jnp.sum(g * jax.jvp(f, (x,), (dx,))[1]))(x)
    return f(x), tangent, jax.vjp(f, x)[1](g)[0], second

  found = derivatives(lambda x: mp.normalize(x, (0, 1)))
  for a, b in zip(found, derivatives(formula), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_weights_are_normalized_together_as_alone():
  rng = np.random.default_rng(0)
  shapes = {"a": (3, 4), "b": (3, 4), "c": (3, 3, 3, 4), "d": (5, 4)}
  params = {k: {"weight": jnp.asarray(rng.normal(size=s))} for k, s in shapes.items()}
  params["gain"] = jnp.ones(())
  together = mp._normalize_weights(params, largest=20)
  alone = mp._normalize_weights(params, largest=0)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6), together, alone
  )
  np.testing.assert_array_equal(
    alone["c"]["weight"], mp.normalize_weight(params["c"]["weight"])
  )


def test_a_product_with_parts_is_that_with_their_concatenation():
  rng = np.random.default_rng(0)
  a, b = (jnp.asarray(rng.normal(size=(2, n)), jnp.float32) for n in (6, 3))
  layer = mp.Linear(4)
  params = layer.init(jax.random.key(0), jnp.ones((1, 9)))
  expected = layer.apply(params, mp.concatenate(a, b, 0.3))
  found = layer.apply(params, (a, b), mp.concatenation_gains(6, 3, 0.3))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
