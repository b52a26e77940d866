"""PixArt against the numbers of diffusers: its network, and a whole folder."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peer_networks
import pytest
from conftest import FIXTURES
from peer_networks import error

from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import text_to_image
from sdiff_jax.pretrained.diffusers import loading, networks, pixart_transformer
from sdiff_jax.samplers import paradigms, sequential

PIXART = FIXTURES / "tiny-pixart"
quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@pytest.fixture
def peer(fixture):
  """Returns config, weights and arrays of a network, images as NHWC."""

  def load(name: str) -> tuple[dict, dict, dict]:
    config, weights, arrays = peer_networks.part(fixture("diffusers_pixart"), name)
    return config, weights, arrays

  return load


@pytest.mark.parametrize("name", ["alpha", "sigma"])
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
def run():
  """Returns the peer's latents and image, ours, and the latents in parallel."""
  with np.load(PIXART / "expected.npz") as stored:
    arrays = dict(stored)
  meta, model = json.loads(str(arrays["meta"])), loading.load(str(PIXART))
  x, wanted = (np.moveaxis(arrays[k], 1, -1) for k in ("latents_in", "latents_out"))
  model = loading.with_shape(model, x.shape[1:])
  schedule, sampler = text_to_image.build_sampler(
    model.schedule, name="paradpmpp2m", steps=10, window=5, tolerance=0.0
  )
  model = model._replace(schedule=schedule)
  pipeline = text_to_image.pipeline(
    model,
    sampler,
    sharding.make_mesh(devices=jax.devices()[:1]),
    guidance_scale=meta["guidance_scale"],
    prompts=[f"  {meta['prompt'].upper()} "],  # is set in lower case
    negative_prompt=meta["negative_prompt"],
  )
  _, inputs = pipeline.requests(np.arange(1))

  @quickly
  def sample(params, x, inputs):
    denoise, cond = pipeline.denoiser(params, inputs)
    keys = sequential.keys_from_seeds(np.arange(1))
    args = denoise, sampler.tableau, x, keys, cond
    one = sequential.sample(*args)
    many = paradigms.run(*args, window=5, tolerance=0.0)
    return one, many, model.vae.decode(params["vae"], one / model.vae.scaling)

  return arrays["image"], wanted, *sample(model.params, jnp.asarray(x), inputs)


def test_text_to_image():
  """Ten steps with guidance."""
  image, wanted, one, _, pixels = run()
  assert np.abs(one - wanted).max() < 1e-4 * np.abs(wanted).max()
  pixels = np.clip(np.asarray(pixels) / 2 + 0.5, 0, 1)
  np.testing.assert_allclose(pixels, image, atol=2e-4)


def test_in_parallel():
  """At tolerance 0, ParaDiGMS ends where the sequential sampler does."""
  *_, one, many, _ = run()
  np.testing.assert_allclose(many.x, one, rtol=0, atol=2e-6 * np.abs(one).max())
  assert (many.num_iterations <= 10).all()


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
