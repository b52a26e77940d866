"""Adapters: the product in closed form, frozen weights, and the jvp."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_forms import central

from sdiff_jax import config as configs
from sdiff_jax.data import digits
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import training
from sdiff_jax.models.layers import lora
from sdiff_jax.training.trainer import initialize_from
from sdiff_jax.types import UserError

RANK, ALPHA = 2, 3.0


def settings(**fields):
  config = configs.base()
  config.model = configs.component("models", "dit", patch=4, width=16, depth=1, heads=2)
  config.loss = configs.component("losses", "scm", velocity="data")
  config.lora.update(rank=RANK, alpha=ALPHA, **fields)
  config.train.batch_size = 4
  return config


def randomized(params, seed: int = 0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), params
  )


def test_weights_of_all_kinds_get_the_product():
  """A matrix, a convolution, a matrix whose columns are heads, and one of blocks."""
  rng = np.random.default_rng(0)
  shapes = {"m": (5, 7), "c": (3, 3, 5, 7), "h": (6, 2, 4)}
  net = {
    k: {"kernel": rng.standard_normal(s).astype(np.float32), "bias": np.zeros(7)}
    for k, s in shapes.items()
  }
  net["blocks"] = {"h": {"kernel": np.stack([net["h"]["kernel"]] * 3)}}
  adapters = lora.init(jax.random.key(0), net, rank=RANK, targets=".")
  jax.tree.map(np.testing.assert_array_equal, lora.merge(net, adapters, 1.5), net)
  adapters = randomized(adapters)
  merged = lora.merge(net, adapters, 1.5)
  for name, spec in {
    "m": "ir,ro->io",
    "c": "hwir,ro->hwio",
    "h": "ir,rno->ino",
  }.items():
    pair = adapters[name]["kernel"]
    product = np.einsum(spec, pair["a"], pair["b"])
    np.testing.assert_allclose(
      merged[name]["kernel"], net[name]["kernel"] + 1.5 * product, rtol=1e-5, atol=1e-6
    )
    assert merged[name]["bias"] is net[name]["bias"]
  pair = adapters["blocks"]["h"]["kernel"]
  product = np.einsum("lir,lrno->lino", pair["a"], pair["b"])
  found = merged["blocks"]["h"]["kernel"] - net["blocks"]["h"]["kernel"]
  np.testing.assert_allclose(found, 1.5 * product, rtol=1e-5, atol=1e-6)


def test_merged_equals_apart(x64):
  """y = x W + s (x A) B by numpy, and by the network's parameters."""
  rng = np.random.default_rng(1)
  x, w = rng.standard_normal((9, 5)), rng.standard_normal((5, 7))
  adapters = {
    "kernel": {"a": rng.standard_normal((5, 2)), "b": rng.standard_normal((2, 7))}
  }
  merged = lora.merge({"kernel": w}, adapters, 1.5)["kernel"]
  apart = x @ w + 1.5 * (x @ adapters["kernel"]["a"]) @ adapters["kernel"]["b"]
  np.testing.assert_allclose(x @ merged, apart, rtol=1e-12)


def test_a_network_with_adapters_is_the_merged_one():
  """In float32 to 1e-5, and its tangent is that of the merged network."""
  config = settings()
  network = experiments.network(config, digits.build())
  params = randomized(jax.eval_shape(network.init, jax.random.key(0)))
  config.lora.rank = 0
  plain = experiments.network(config, digits.build())
  config.lora.rank = RANK
  merged = experiments.merged(config, params)
  assert merged.keys() == {"net", "logvar"}
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 1)), jnp.float32)
  t, cond = jnp.array([0.3, 1.2]), {"label": jnp.array([1, 7])}

  def tangent(network, params):
    return jax.jvp(
      lambda x, t: network.apply(params, x, t, cond), (x, t), (x, jnp.ones_like(t))
    )

  found, expected = tangent(network, params), tangent(plain, merged)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  changed = network.apply(params, x, t, cond)
  without = plain.apply({k: params[k] for k in ("net", "logvar")}, x, t, cond)
  assert np.abs(changed - without).max() > 0.1


def test_only_adapters_are_trained():
  """Three steps of sCT: weights stay to the bit, Adam has moments of the adapters alone."""
  config = settings()
  config.optim.update(name="adamw", weight_decay=0.1, learning_rate=0.1)
  experiment = experiments.build(config)
  trainer = training.build_trainer(config, experiment.network, None, None)
  key = jax.random.key(0)
  fresh = trainer.create_state(key).params
  state = trainer.create_state(key, {"net": randomized(fresh["net"])})
  before = jax.tree.map(np.array, state.params)
  moments = optax.tree.get(state.opt_state, "mu")
  sizes = {id(x): x.size for x in jax.tree.leaves(moments)}
  trained = (before["lora"], before["logvar"])
  assert sum(sizes.values()) == sum(x.size for x in jax.tree.leaves(trained))
  images, cond = experiment.dataset[np.arange(4)]
  batch = {"x0": experiment.dataset.codec.encode(images, 0.5), "cond": cond}
  batch = jax.tree.map(jnp.asarray, batch)
  for _ in range(3):
    state, metrics = trainer.step(state, batch, key)
  assert np.isfinite(metrics["loss"])
  jax.tree.map(np.testing.assert_array_equal, state.params["net"], before["net"])
  for average in state.ema.values():
    jax.tree.map(np.testing.assert_array_equal, average["net"], before["net"])
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, before)
  assert min(jax.tree.leaves(moved["lora"])) > 0


def test_the_gradient_of_adapters_is_the_central_difference(x64):
  """Of a scalar of the jvp, as in the loss of sCM, in float64."""
  net = {"a": {"kernel": np.linspace(-1, 1, 12).reshape(3, 4)}}
  net["b"] = {"kernel": np.linspace(1, -1, 12).reshape(4, 3)}
  adapters = randomized(lora.init(jax.random.key(0), net, rank=1, targets="."))
  x = jnp.array([0.3, -0.2, 0.5])

  def value(s):
    moved = jax.tree.map(lambda v: v * s, adapters)
    w = lora.merge(net, moved, 1.5)
    f = lambda x: jnp.tanh(x @ w["a"]["kernel"]) @ w["b"]["kernel"]  # noqa: E731
    return jnp.sum(jnp.sin(jax.jvp(f, (x,), (x,))[1]))

  exact = jax.grad(value)(jnp.float64(1))
  np.testing.assert_allclose(exact, central(value, (1.0,), (1.0,)), rtol=1e-6)


def test_init_from_a_run_without_adapters():
  network = experiments.network(settings(), digits.build())
  fresh = network.init(jax.random.key(0))
  source = {"net": randomized(fresh["net"]), "logvar": fresh["logvar"]}
  params = initialize_from(source, fresh)
  jax.tree.map(np.testing.assert_array_equal, params["net"], source["net"])
  assert params["lora"] is fresh["lora"]


@pytest.mark.parametrize(
  ("targets", "message"),
  [
    ("to_nowhere", "config.lora.targets='to_nowhere': no weight has such a name; one"),
    ("(", r"config.lora.targets='\(': no regular expression"),
  ],
)
def test_targets_that_are_none(targets, message):
  with pytest.raises(UserError, match=message):
    experiments.network(settings(targets=targets), digits.build())
