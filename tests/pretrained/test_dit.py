"""DiT of the diffusers format, with classes, against the numbers of diffusers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peer_pipelines
import pytest
from conftest import FIXTURES
from peer_networks import error
from peer_pipelines import quickly

from sdiff_jax import config as configs
from sdiff_jax.jobs import generate
from sdiff_jax.pretrained.diffusers import (
  dit_transformer,
  loading,
  networks,
  scheduler,
)
from sdiff_jax.types import UserError

DIT = FIXTURES / "tiny-dit"


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


def test_outputs_and_tangents(fixture):
  """On latents larger than those of training; the second sample has no class."""
  arrays = fixture("diffusers_dit")
  out, tangent = both(arrays, "float32")
  assert error(out, arrays["out"]) < 1e-5
  assert error(tangent, arrays["tangent"]) < 1e-4


@pytest.mark.slow
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


def test_any_height_and_width(fixture):
  net, params = network(fixture("diffusers_dit"), "float32")
  with pytest.raises(ValueError, match="2 must divide"):
    net.apply(params, jnp.zeros((1, 7, 8, 4)), jnp.zeros(1), {})
  out = net.apply(
    params, jnp.zeros((1, 6, 8, 4)), jnp.zeros(1), {"label": jnp.zeros(1, int)}
  )
  assert out.shape == (1, 6, 8, 4)


@functools.cache
def load() -> loading.Model:
  return loading.load(str(DIT))


@pytest.mark.parametrize(
  ("name", "solver"),
  [
    ("DDIM", "ddim"),
    pytest.param("DPMSolverMultistep", "dpmpp2m", marks=pytest.mark.slow),
  ],
)
def test_pipeline(name, solver):
  """Ten steps with guidance 2, whose class is none; variances are left out.

  At tolerance 0, ParaDiGMS ends where the sequential sampler does, to the bit.
  """
  arrays, _ = peer_pipelines.arrays(DIT / "expected.npz")
  process = scheduler.from_config({"_class_name": f"{name}Scheduler"})
  made = peer_pipelines.run(
    load() if name == "DDIM" else load()._replace(schedule=process),
    arrays["latents_in"],
    name=f"para{solver}",
    steps=10,
    guidance_scale=2.0,
    labels=[2, 0],
  )
  kind = {"DDIM": "ddim"}.get(name, "dpmsolver")
  assert error(made.one, arrays[f"{kind}_latents"]) < 1e-5
  np.testing.assert_allclose(made.images, arrays[f"{kind}_image"], atol=1e-4)
  peer_pipelines.check_in_parallel(made, 10)


@pytest.mark.slow
def test_job(tmp_path):
  """Classes by name and by number, and every PNG says its class."""
  config = configs.base()
  config.generate.update(folder=str(DIT), labels="white shark; 0")
  config.sampler.update(name="ddim", steps=2)
  config.sample.update(num=3, batch_size=8, guidance=4.0)
  assert "made 3 of 3" in generate.run(config, str(tmp_path))
  rows = json.loads((tmp_path / "images.json").read_text())["images"]
  assert [(row["prompt"], row["label"]) for row in rows] == [
    (None, 2),
    (None, 0),
    (None, 2),
  ]
  assert "made 0 of 3" in generate.run(config, str(tmp_path))
  config.generate.labels = "white shark"
  with pytest.raises(UserError, match=r"label \(0 there, 2 now\)"):
    generate.run(config, str(tmp_path))
  for field, value, message in (
    ("labels", "shark", "config.generate.labels='shark': must be a class, 0 to 2"),
    ("labels", "3", "labels='3': must be a class, 0 to 2"),
    ("prompts", "a cat", "takes no text"),
  ):
    wrong = config.copy_and_resolve_references()
    wrong.generate[field] = value
    with pytest.raises(UserError, match=message):
      generate.run(wrong, str(tmp_path / "other"))
