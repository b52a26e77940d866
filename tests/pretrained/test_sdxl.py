"""Stable Diffusion XL against the numbers of diffusers: its U-Net, and whole folders."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peer_networks
import peer_pipelines
import pytest
from conftest import FIXTURES
from peer_networks import error
from peer_pipelines import quickly

from sdiff_jax import config as configs
from sdiff_jax.io import image_io
from sdiff_jax.jobs import generate
from sdiff_jax.pretrained.diffusers import loading, networks, unet2d_condition
from sdiff_jax.types import UserError

SDXL = FIXTURES / "tiny-sdxl"


@pytest.fixture
def peer(fixture):
  """Returns config, weights and arrays of a U-Net, images as NHWC."""

  def load(name: str) -> tuple[dict, dict, dict]:
    config, weights, arrays = peer_networks.part(fixture("diffusers_unets"), name)
    return config, weights, arrays

  return load


def both(config, weights, arrays, dtype: str):
  """Returns the prediction and its tangent in x and t."""
  net = unet2d_condition.from_config(config, dtype=dtype)
  params = networks.load_state_dict(weights, net.init, dtype=dtype, path="")
  a = {k: jnp.asarray(v, dtype) for k, v in arrays.items()}
  names = ("text", "pooled", "time_ids", "distilled_guidance")
  cond = {k: a[k] for k in names}

  @quickly
  def run(params, x, time, dx, dt):
    call = lambda x, time: net.apply(params, x, time, cond)  # noqa: E731
    return jax.jvp(call, (x, time), (dx, dt))

  return run(params, a["x"], a["time"], a["dx"], a["dt"])


@pytest.mark.parametrize("name", ["sdxl", pytest.param("lcm", marks=pytest.mark.slow)])
def test_outputs_and_tangents(peer, name):
  """With sizes of the image, and with a distilled guidance scale."""
  config, weights, arrays = peer(name)
  out, tangent = both(config, weights, arrays, "float32")
  assert error(out, arrays["out"]) < 1e-5
  assert error(tangent, arrays["tangent"]) < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sdxl", "lcm"])
def test_in_double_precision(peer, name):
  """The peer embeds times in float32, whose angles are off by 1e-5."""
  config, weights, arrays = peer(name)
  with jax.numpy_dtype_promotion("standard"):  # init under x64 mixes types
    out, tangent = both(config, weights, arrays, "float64")
  assert error(out, arrays["out"]) < 5e-6
  assert error(tangent, arrays["tangent"]) < 5e-5


@functools.cache
def load() -> loading.Model:
  return loading.load(str(SDXL))


def run(file: str, *, in_parallel: bool = False) -> tuple:
  """Returns the peer's arrays, and what our pipeline makes."""
  arrays, meta = peer_pipelines.arrays(SDXL / file)
  made = peer_pipelines.run(
    load(),
    arrays["latents_in"],
    name="paraeuler",
    steps=meta["steps"],
    in_parallel=in_parallel,
    guidance_scale=meta["guidance_scale"],
    prompts=[meta["prompt"]],
    negative_prompt=meta["negative_prompt"],
  )
  return arrays, made


FILES = pytest.mark.parametrize(
  "file",
  ["expected.npz", pytest.param("expected_negative.npz", marks=pytest.mark.slow)],
)


@FILES
def test_text_to_image(file):
  """Ten steps with guidance: from zeros, and from a negative prompt."""
  arrays, made = run(file)
  assert error(made.one, arrays["latents_out"]) < 1e-4
  np.testing.assert_allclose(made.images, arrays["image"], atol=1e-4)


@pytest.mark.slow
@FILES
def test_in_parallel(file):
  """At tolerance 0, ParaDiGMS ends where the sequential sampler does, to the bit."""
  peer_pipelines.check_in_parallel(run(file, in_parallel=True)[1], 10)


def test_sizes_of_images():
  """Original, corner of the crop, and ours, in pixels."""
  model = loading.with_shape(load(), (8, 12, 4))
  tokens = {name: jnp.zeros((3, 12), jnp.int32) for name in model.text_encoders}
  cond = quickly(model.encode)(model.params, tokens)
  assert cond["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 3
  assert (cond["text"].shape, cond["pooled"].shape) == ((3, 12, 20), (3, 6))


@pytest.mark.slow
def test_published_size():
  """That of the model's page."""
  folder = FIXTURES.parents[1] / "configs" / "published" / "stable_diffusion_xl"
  files = loading.configs(str(folder))
  model = loading.abstract({k: files[k] for k in ("unet", "vae", "scheduler")})
  assert sum(x.size for x in jax.tree.leaves(model.params["unet"])) == 2_567_463_684
  assert model.size == (1024, 1024)


@pytest.mark.parametrize(
  ("part", "fields", "message"),
  [
    (
      "unet/config.json",
      {"addition_time_embed_dim": 7},
      "projection_class_embeddings_input_dim=54: must be above 6 addition_time_embed_di",
    ),
    (
      "unet/config.json",
      {"addition_embed_type": "image"},
      "addition_embed_type='image': must be one of text_time, or null",
    ),
    (
      "model_index.json",
      {"force_zeros_for_empty_prompt": 2},
      "force_zeros_for_empty_prompt=2: must be true or false",
    ),
    (
      "model_index.json",
      {"text_encoder_2": [None, None]},
      "the unet takes the texts of text_encoder_2, which is not there",
    ),
  ],
)
def test_damaged_folders(tmp_path, part, fields, message):
  folder = shutil.copytree(SDXL, tmp_path / "sdxl")
  path = folder / part
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))
  with pytest.raises(UserError, match=message):
    loading.load(str(folder))


@pytest.mark.slow
def test_job(tmp_path):
  """From a prompt to a file, by the sampler of the config."""
  config = configs.load(str(FIXTURES.parents[1] / "configs" / "sdxl.py"), "missing")
  config.generate.update(folder=str(SDXL), prompts="a cat", size=(16, 24))
  config.generate.dtype = "float32"
  config.sampler.update(steps=3, window=2)
  config.sample.update(num=1, batch_size=8)
  assert "made 1 of 1" in generate.run(config, str(tmp_path))
  assert "a cat" in image_io.about(tmp_path / "images" / "00000.png")
