"""Small networks of every registered class, all of whose options are on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from closed_forms import random_params

from sdiff_jax import registry
from sdiff_jax.types import CondSpec


def case(name: str) -> dict:
  """Returns the arguments of build that the network registers as `minimal`."""
  fields = registry.lookup("models", name).facts["minimal"]
  needs_sigma_d = "sigma_d" in registry.required("models", name)
  return {"sigma_d": 0.5} | fields if needs_sigma_d else dict(fields)


CASES = {  # a published network is tested in tests/pretrained/test_trigflow_network.py
  name: case(name) for name in registry.names("models") if name != "pretrained"
}
# A condition of every kind, which every network embeds.
COND = {
  "label": CondSpec((), np.int32, num_classes=3),
  "angle": CondSpec((), np.float32),
  "observation": CondSpec((5,), np.float32),
  "mask": CondSpec((2, 3), np.bool_),
}
B = 4
# What the cases are conditioned on, by the number of axes of a sample: action chunks,
# images, or either of them.
NATIVE = {2: ("observation",), 3: ("label",), None: ("label", "observation")}
GUIDED = [name for name in CASES if "guidance" in registry.fields("models", name)]


def native(name: str) -> tuple[str, ...]:
  return NATIVE[registry.lookup("models", name).facts.get("sample_ndim")]


@functools.cache
def build(name: str, **options):
  """Returns a small network, compiled once, all of whose options are on."""
  given = {"guidance": True} if name in GUIDED else {}
  names = options.get("cond", native(name))
  options |= {"cond": {k: COND[k] for k in names}}
  net = registry.lookup("models", name).build(**CASES[name] | given | options)
  return net._replace(apply=jax.jit(net.apply), init=jax.jit(net.init))


def inputs(name: str, dtype: str = "float32"):
  """Returns x, t, cond and a direction (dx, dt)."""
  rng = np.random.default_rng(0)
  x, dx = (
    jnp.asarray(rng.normal(size=(B, *CASES[name]["shape"])), dtype) for _ in range(2)
  )
  t, dt, guidance = (jnp.asarray(rng.uniform(0.1, 1.5, B), dtype) for _ in range(3))
  cond = {"label": jnp.array([0, 1, 2, -1]), "guidance": guidance}
  cond["observation"] = jnp.asarray(rng.normal(size=(B, 5)), dtype)
  cond["angle"] = jnp.asarray(rng.uniform(0.1, 1.5, B), dtype)
  cond["mask"] = jnp.asarray(rng.random((B, 2, 3)) < 0.5)
  return x, t, cond, (dx, dt)


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@functools.cache
def gradient(name: str, **options) -> dict:
  """Returns the gradient of |F|^2 + |tangent|^2: reverse over forward mode."""
  net = build(name, **options)
  x, t, cond, along = inputs(name)

  @jax.jit
  @jax.grad
  def of_value(params):
    F, J = jax.jvp(lambda x, t: net.apply(params, x, t, cond), (x, t), along)
    return jnp.mean(F**2) + jnp.mean(J**2)

  return of_value(random_params(net, dtype="float32"))["net"]
