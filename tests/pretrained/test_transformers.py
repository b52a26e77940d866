"""Transformers of the diffusers format against the numbers of those who made them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peer_networks
import pytest
from peer_networks import error

from sdiff_jax.pretrained.diffusers import (
  flux_transformer,
  loading,
  networks,
  sd3_transformer,
)

NAMES = ("sd3", "sd35", "flux", "schnell")
quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@pytest.fixture
def peer(fixture):
  """Returns config, weights and arrays of a network, images as NHWC."""

  def load(name: str) -> tuple[dict, dict, dict]:
    config, weights, arrays = peer_networks.part(
      fixture("diffusers_transformers"), name
    )
    return config, weights, arrays

  return load


def both(config, weights, arrays, dtype: str, wide: str):
  """Returns the prediction and its tangent in x and t."""
  net = loading._network_from_config(config, "config.json", dtype=dtype, remat="")
  params = networks.load_state_dict(weights, net.init, dtype=dtype, path="")
  a = {k: jnp.asarray(v, wide) for k, v in arrays.items()}
  cond = {k: a[k] for k in ("text", "pooled")}
  cond["distilled_guidance"] = a["guidance"]

  @quickly
  def run(params, x, time, dx, dt):
    call = lambda x, time: net.apply(params, x, time, cond)  # noqa: E731
    return jax.jvp(call, (x, time), (dx, dt))

  return run(params, a["x"], a["time"], a["dx"], a["dt"])


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_tangents(peer, name):
  """In float32; the weights are those of float16."""
  config, weights, arrays = peer(name)
  out, tangent = both(config, weights, arrays, "float32", "float32")
  assert error(out, arrays["out"]) < 1e-5
  assert error(tangent, arrays["tangent"]) < 1e-4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sd35", "flux"])
def test_in_double_precision(peer, name):
  """The peer embeds times in float32, whose angles are off by 1e-5."""
  config, weights, arrays = peer(name)
  with jax.numpy_dtype_promotion("standard"):  # init under x64 mixes types
    out, tangent = both(config, weights, arrays, "float64", "float64")
  assert error(out, arrays["out"]) < 5e-6
  assert error(tangent, arrays["tangent"]) < 5e-5


@pytest.mark.parametrize(
  ("module", "fields", "message"),
  [
    (sd3_transformer, {"qk_norm": "l2"}, "qk_norm='l2': must be 'rms_norm' or null"),
    (sd3_transformer, {"out_channels": 8}, "out_channels=8: must be in_channels=16"),
    (
      sd3_transformer,
      {"caption_projection_dim": 1},
      "must be attention_head_dim times",
    ),
    (
      sd3_transformer,
      {"sample_size": 200},
      "sample_size=200: must be a multiple of pa",
    ),
    (sd3_transformer, {"more": 1}, "unknown fields: more"),
    (
      flux_transformer,
      {"axes_dims_rope": [16, 56, 58]},
      r"axes_dims_rope=\[16, 56, 58",
    ),
    (flux_transformer, {"in_channels": 66}, "in_channels=66: must be a multiple of 4"),
    (flux_transformer, {"patch_size": 2}, "values not supported: patch_size=2"),
  ],
)
def test_wrong_fields(module, fields, message):
  with pytest.raises(ValueError, match=message):
    module.from_config(fields)


def test_sides_that_do_not_fit(peer):
  config, weights, _ = peer("sd3")
  net = sd3_transformer.from_config(config)
  params = networks.load_state_dict(weights, net.init, dtype="float32", path="")
  for shape, message in (
    ((1, 7, 8, 4), "2 must divide"),
    ((1, 8, 14, 4), "at most 12"),
  ):
    with pytest.raises(ValueError, match=message):
      net.apply(params, jnp.zeros(shape), jnp.zeros(1), {})


def test_fixed_positions(peer):
  """The table that a file stores is the one that a new network begins with."""
  config, weights, _ = peer("sd3")
  del config["_class_name"]
  net = sd3_transformer.from_config(config)
  table = quickly(net.init)(jax.random.key(0))["pos_embed.pos_embed"]
  stored = weights["pos_embed.pos_embed"]
  np.testing.assert_allclose(table.T, stored, atol=1e-3)  # of float16
