"""Gradients that replicas sum by themselves, and what the compiled step sends."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdiff_jax.capacity import hlo
from sdiff_jax.distributed import replicas, sharding
from sdiff_jax.models import edm2, mlp
from sdiff_jax.training import state, step

PARTS = 4


NETWORKS = {
  "mlp": functools.partial(mlp.build, width=32, depth=2),
  "edm2": functools.partial(
    edm2.build,
    sigma_d=0.5,
    channels=16,
    channel_mult=(1,),
    blocks=1,
    attn_resolutions=(4,),
    head_channels=8,
  ),
}


@pytest.fixture(
  scope="module", params=["mlp", pytest.param("edm2", marks=pytest.mark.slow)]
)
def network(request):
  return NETWORKS[request.param](shape=(4, 4, 4), cond={})


def program(mesh, dtype, parts, net):
  """Returns the compiled step of a loss without draws, and its arguments."""
  run, args = traced(mesh, dtype, parts, net)
  return run.lower(*args).compile(), args


def traced(mesh, dtype, parts, net):
  """Returns the step under jit, and its arguments."""
  trained = replicas.network(net) if dtype else net

  def loss(params, batch, key, number, frozen):
    x0 = batch["x0"]
    t = jnp.full(len(x0), 0.7)
    F = trained.apply(params, x0, t, None)
    w = trained.logvar(params, t)
    return jnp.mean(jnp.exp(w) * jnp.mean(jnp.square(F - x0), (1, 2, 3))), {}

  optimizer, rate = optax.sgd(1.0), optax.constant_schedule(1.0)
  function = step.build(
    loss,
    optimizer,
    learning_rate=rate,
    grad_accum_steps=parts,
    grad_dtype=dtype,
  )
  params = jax.jit(net.init)(jax.random.key(0))
  params = jax.tree.map(lambda x: x + 0.1, params)  # gains start at 0
  current = state.create(params, optimizer, ())
  x0 = np.random.default_rng(0).standard_normal((64, 4, 4, 4), np.float32)
  args = current, {"x0": x0, "cond": None}, jax.random.key(0), None
  return step.jitted(function, mesh, current, None), args


def added(compiled) -> int:
  """Returns the bytes that all-reduces of a step add, its loops counted in full."""
  found = hlo.total(hlo.read(compiled.as_text()))
  return sum(size for (kind, _), (_, size, *_) in found.items() if kind == "all-reduce")


@pytest.fixture(scope="module")
def whole(network):
  compiled, args = program(sharding.make_mesh(8, 1, 1), None, 1, network)
  return compiled, jax.device_get(compiled(*_placed(compiled, args))[0].params)


def _placed(compiled, args):
  return jax.device_put(args, compiled.input_shardings[0])


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1)])
def test_a_batch_in_parts_updates_as_a_whole_one(monkeypatch, network, whole, sizes):
  monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 256)
  compiled, args = program(sharding.make_mesh(*sizes), jnp.float32, PARTS, network)
  found = jax.device_get(compiled(*_placed(compiled, args))[0].params)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole[1]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_gradients_are_added_once_a_step(network, whole):
  """Where the compiler adds them, it does so in every part."""
  mesh, one = sharding.make_mesh(8, 1, 1), added(whole[0])
  once, _ = program(mesh, jnp.float32, PARTS, network)
  each, _ = program(mesh, None, PARTS, network)
  few = 1000  # losses and norms
  assert one <= added(once) < one + few
  assert PARTS * one <= added(each) < PARTS * one + few


def test_gradients_are_sent_in_their_type(network):
  """In bfloat16 the lowered step adds every parameter's gradient in bfloat16."""
  sizes, parameters = {}, jax.eval_shape(network.init, jax.random.key(0))
  run, args = traced(sharding.make_mesh(8, 1, 1), jnp.bfloat16, 1, network)
  for line in run.lower(*args).as_text().split('"stablehlo.all_reduce"')[1:]:
    shape, dtype = re.search(r"-> tensor<([\dx]*?)x?(b?f\d+)>", line).groups()
    sizes[dtype] = sizes.get(dtype, 0) + math.prod(
      map(int, filter(None, shape.split("x")))
    )
  assert sizes == {"bf16": sum(x.size for x in jax.tree.leaves(parameters))}
