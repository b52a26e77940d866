"""PixArt against the numbers of diffusers: its network, and a whole folder."""

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

from sdiff_jax.pretrained.diffusers import loading, networks, pixart_transformer
from sdiff_jax.pretrained.diffusers import model as model_lib

PIXART = FIXTURES / "tiny-pixart"


@pytest.fixture
def peer(fixture):
  """Returns config, weights and arrays of a network, images as NHWC."""

  def load(name: str) -> tuple[dict, dict, dict]:
    config, weights, arrays = peer_networks.part(fixture("diffusers_pixart"), name)
    return config, weights, arrays

  return load


@pytest.mark.parametrize(
  "name", ["alpha", pytest.param("sigma", marks=pytest.mark.slow)]
)
def test_outputs_and_tangents(peer, name):
  """Alpha is told the size of the image; the variances of both are left out."""
  config, weights, arrays = peer(name)
  net = pixart_transformer.from_config(config)
  params = networks.load_state_dict(weights, net.init, dtype="float32", path="")
  names = ("x", "time", "dx", "dt", "text", "time_ids")
  a = {k: jnp.asarray(arrays[k], jnp.float32) for k in names}
  cond = {k: a[k] for k in ("text", "time_ids")}
  cond["mask"] = jnp.asarray(arrays["mask"], bool)

  @quickly
  def run(params, x, time, dx, dt):
    call = lambda x, time: net.apply(params, x, time, cond)  # noqa: E731
    return jax.jvp(call, (x, time), (dx, dt))

  out, tangent = run(params, *(a[k] for k in names[:4]))
  assert (net.sized, net.long_text) == (
    (True, 120) if name == "alpha" else (False, 300)
  )
  assert error(out, arrays["out"][..., :4]) < 1e-5
  assert error(tangent, arrays["tangent"][..., :4]) < 1e-4


@functools.cache
def run(*, loop: bool = False) -> tuple:
  """Returns the peer's arrays, and what our pipeline makes."""
  arrays, meta = peer_pipelines.arrays(PIXART / "expected.npz")
  model = loading.load(str(PIXART))
  if loop:
    model = model._replace(params=model_lib.stacked(model, model.params))
  made = peer_pipelines.run(
    model,
    arrays["latents_in"],
    name="paradpmpp2m",
    steps=10,
    guidance_scale=meta["guidance_scale"],
    prompts=[f"  {meta['prompt'].upper()} "],  # is set in lower case
    negative_prompt=meta["negative_prompt"],
  )
  return arrays, made


@pytest.mark.slow
@pytest.mark.parametrize("loop", [False, True])
def test_text_to_image(loop):
  """Ten steps with guidance."""
  arrays, made = run(loop=loop)
  assert error(made.one, arrays["latents_out"]) < 1e-4
  np.testing.assert_allclose(made.images, arrays["image"], atol=2e-4)


@pytest.mark.parametrize("loop", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_parallel(loop):
  """At tolerance 0, ParaDiGMS ends where the sequential sampler does, to the bit."""
  peer_pipelines.check_in_parallel(run(loop=loop)[1], 10)


def test_published_names(tmp_path):
  """Files of 2024 have the name of the class that DiT's have, too."""
  folder = shutil.copytree(PIXART / "transformer", tmp_path / "transformer")
  path = folder / "config.json"
  config = json.loads(path.read_text()) | {"_class_name": "Transformer2DModel"}
  path.write_text(json.dumps(config))
  net = loading.network(str(folder))
  assert (net.sized, net.masked, net.classes) == (True, True, 0)


def test_size_of_alpha():
  """That of PixArt-XL-2-1024-MS; its paper has 0.6 billion."""
  net = pixart_transformer.from_config({"caption_channels": 4096})
  shapes = jax.eval_shape(net.init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 611_349_152


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"caption_channels": None}, "caption_channels=None: must be an integer from 1"),
    ({"out_channels": 5}, "out_channels=5: must be in_channels=4, or twice as many"),
    ({"cross_attention_dim": 8}, "cross_attention_dim=8: must be attention_head_dim"),
    ({"patch_size": 3}, "sample_size=128: must be a multiple of patch_size=3"),
    ({"norm_type": "ada_norm_zero"}, "values not supported: norm_type='ada_norm_zero'"),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    pixart_transformer.from_config({"caption_channels": 4096} | fields)
