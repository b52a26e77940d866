"""DiT of the diffusers format, with classes, against the numbers of diffusers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import one_at_a_time
from conftest import FIXTURES

from sdiff_jax import config as configs
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import text_to_image
from sdiff_jax.jobs import generate
from sdiff_jax.pretrained.diffusers import (
  dit_transformer,
  loading,
  networks,
  scheduler,
)
from sdiff_jax.samplers import paradigms, sequential
from sdiff_jax.types import UserError

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


def run(name: str, solver: str):
  """Returns the peer's latents and pixels, ours, and our latents in parallel."""
  with np.load(DIT / "expected.npz") as stored:
    arrays = dict(stored)
  x = jnp.asarray(np.moveaxis(arrays["latents_in"], 1, -1))
  process = scheduler.from_config({"_class_name": f"{name}Scheduler"})
  schedule, sampler = text_to_image.build_sampler(
    load().schedule if name == "DDIM" else process, name=f"para{solver}", steps=10
  )
  model = load()._replace(schedule=schedule)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  options = {"guidance_scale": 2.0, "labels": [2, 0]}
  pipeline = text_to_image.pipeline(model, sampler, mesh, **options)
  _, inputs = pipeline.requests(np.arange(2))

  @quickly
  def sample(params, x, inputs):
    denoise, cond = pipeline.denoiser(params, inputs)
    keys = sequential.keys_from_seeds(np.arange(2))
    args = one_at_a_time(denoise), sampler.tableau, x, keys, cond
    one = sequential.sample(*args)
    many = paradigms.run(*args, window=5, tolerance=0.0)
    images = model.vae.decode(params["vae"], one / model.vae.scaling)
    return one, many, images

  kind = {"DDIM": "ddim"}.get(name, "dpmsolver")
  wanted = np.moveaxis(arrays[f"{kind}_latents"], 1, -1), arrays[f"{kind}_image"]
  return *wanted, *sample(model.params, x, inputs)


@pytest.mark.parametrize(
  ("name", "solver"), [("DDIM", "ddim"), ("DPMSolverMultistep", "dpmpp2m")]
)
def test_pipeline(name, solver, monkeypatch):
  """Ten steps with guidance 2, whose class is none; variances are left out.

  At tolerance 0, ParaDiGMS ends where the sequential sampler does, to the bit.
  """
  monkeypatch.setattr(paradigms, "ULPS", 0)
  wanted, pixels, one, many, images = run(name, solver)
  assert error(one, wanted) < 1e-5
  images = np.clip(np.asarray(images) / 2 + 0.5, 0, 1)
  np.testing.assert_allclose(images, pixels, atol=1e-4)
  np.testing.assert_array_equal(many.x, one)
  assert (many.num_iterations <= 10).all()


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
