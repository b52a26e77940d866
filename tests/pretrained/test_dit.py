"""DiT of the diffusers format, with classes, against the numbers of diffusers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES

from sdiff_jax.pretrained.diffusers import dit_transformer, networks

DIT = FIXTURES / "tiny-dit"
quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def network(arrays: dict, dtype: str):
  """Returns the network and its parameters."""
  config = json.loads(str(arrays["config"]))
  net = dit_transformer.from_config(config, dtype=dtype)
  weights = {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}
  return net, networks.load_state_dict(weights, net.init, dtype=dtype, path="")


def both(arrays: dict, dtype: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the prediction and its tangent in x and t, as NCHW."""
  net, params = network(arrays, dtype)
  x, dx = (jnp.asarray(np.moveaxis(arrays[k], 1, -1), dtype) for k in ("x", "dx"))
  time, dt = (jnp.asarray(arrays[k], dtype) for k in ("time", "dt"))
  cond = {"label": jnp.array([2, -1])}

  @quickly
  def run(params, x, time, dx, dt):
    call = lambda x, time: net.apply(params, x, time, cond)  # noqa: E731
    return jax.jvp(call, (x, time), (dx, dt))

  return tuple(np.moveaxis(v, -1, 1) for v in run(params, x, time, dx, dt))


def error(found, wanted) -> float:
  assert found.shape == wanted.shape
  return np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()


def test_outputs_and_tangents(fixture):
  """On latents larger than those of training; the second sample has no class."""
  arrays = fixture("diffusers_dit")
  out, tangent = both(arrays, "float32")
  assert error(out, arrays["out"]) < 1e-5
  assert error(tangent, arrays["tangent"]) < 1e-4


@pytest.mark.usefixtures("x64")
def test_in_double_precision(fixture):
  arrays = fixture("diffusers_dit")
  with jax.numpy_dtype_promotion("standard"):  # init under x64 mixes types
    out, tangent = both(arrays, "float64")
  assert error(out, arrays["out"]) < 1e-7
  assert error(tangent, arrays["tangent"]) < 1e-7


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"norm_type": "ada_norm_single"}, "values not supported: norm_type='ada_norm_s"),
    ({"attention_head_dim": 7, "num_attention_heads": 1}, "attention_head_dim=7: must"),
    ({"sample_size": 7}, "sample_size=7: must be a multiple of patch_size=2"),
    ({"out_channels": 6}, "out_channels=6: must be in_channels=4, or twice as many"),
    ({"more": 1}, "unknown fields: more"),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    dit_transformer.from_config(fields)


def test_sides_that_do_not_fit(fixture):
  net, params = network(fixture("diffusers_dit"), "float32")
  for shape, message in (
    ((1, 7, 7, 4), "2 must divide"),
    ((1, 8, 6, 4), "must be equal"),
  ):
    with pytest.raises(ValueError, match=message):
      net.apply(params, jnp.zeros(shape), jnp.zeros(1), {})
