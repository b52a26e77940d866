"""SANA against the numbers of diffusers: its networks, and whole folders."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peer_networks
import peer_pipelines
import pytest
from closed_forms import run_recurrence
from conftest import FIXTURES
from peer_networks import error
from peer_pipelines import quickly

from sdiff_jax import config as configs
from sdiff_jax.experiment import published_model
from sdiff_jax.jobs import generate
from sdiff_jax.pretrained.diffusers import (
  autoencoder_dc,
  clip_text,
  fit,
  gemma_text,
  loading,
  networks,
  sana_transformer,
  scheduler,
)
from sdiff_jax.pretrained.diffusers import model as model_lib

SANA, SPRINT = FIXTURES / "tiny-sana", FIXTURES / "tiny-sana-sprint"


@pytest.fixture
def peer(fixture):
  """Returns a network with its parameters, and arrays, images as NHWC."""
  modules = {"dc": autoencoder_dc, "deep": autoencoder_dc, "gemma": gemma_text}

  def load(name: str, dtype: str = "float32") -> tuple:
    config, weights, arrays = peer_networks.part(fixture("diffusers_sana"), name)
    net = modules.get(name, sana_transformer).from_config(config, dtype=dtype)
    params = networks.load_state_dict(weights, net.init, dtype=dtype, path="")
    return net, params, arrays

  return load


def both(net, params, arrays, dtype: str):
  """Returns the prediction and its tangent in x and t."""
  names = ("x", "time", "dx", "dt", "text", "distilled_guidance")
  a = {k: jnp.asarray(arrays[k], dtype) for k in names}
  cond = {k: a[k] for k in ("text", "distilled_guidance")}
  cond["mask"] = jnp.asarray(arrays["mask"], bool)

  @quickly
  def run(params, x, time, dx, dt):
    call = lambda x, time: net.apply(params, x, time, cond)  # noqa: E731
    return jax.jvp(call, (x, time), (dx, dt))

  return run(params, *(a[k] for k in names[:4]))


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("sana", marks=pytest.mark.slow),
    "sprint",
    pytest.param("large", marks=pytest.mark.slow),
  ],
)
def test_outputs_and_tangents(peer, name):
  """Sprint has a guidance scale and norms of queries, the large one has positions."""
  net, params, arrays = peer(name)
  out, tangent = both(net, params, arrays, "float32")
  assert error(out, arrays["out"]) < 1e-5
  assert error(tangent, arrays["tangent"]) < 1e-4


@pytest.mark.parametrize("name", ["dc", pytest.param("deep", marks=pytest.mark.slow)])
def test_autoencoder(peer, name):
  """With convolutions of stride 2, and with pixels moved into channels."""
  net, params, arrays = peer(name)
  mean, std = quickly(net.encode)(params, jnp.asarray(arrays["images"], jnp.float32))
  assert error(mean, arrays["latents"]) < 1e-5
  assert not std.any()
  images = quickly(net.decode)(params, jnp.asarray(arrays["latents"], jnp.float32))
  assert error(images, arrays["decoded"]) < 1e-5


def test_text_encoder(peer):
  """Padding is not attended to."""
  net, params, arrays = peer("gemma")
  ids = jnp.asarray(arrays["ids"], jnp.int32)
  text = quickly(net.apply)(params, ids, ids != net.padding)
  assert error(text.hidden, arrays["hidden"]) < 1e-5


@functools.cache
def load(folder) -> loading.Model:
  return loading.load(str(folder))


@functools.cache
def run() -> tuple:
  """Returns the peer's arrays, and what our pipeline makes."""
  arrays, meta = peer_pipelines.arrays(SANA / "expected_10.npz")
  made = peer_pipelines.run(
    model_lib.with_instruction(load(SANA), meta["instruction"]),
    arrays["latents_in"],
    name="paradpmpp2m",
    steps=10,
    guidance_scale=meta["guidance_scale"],
    prompts=[meta["prompt"]],
    negative_prompt=meta["negative_prompt"],
  )
  return arrays, made


def test_tokens():
  """The instruction stands before a prompt, not before a negative one."""
  arrays, made = run()
  for name, ids in (("tokens", "ids"), ("negative_tokens", "negative_ids")):
    count = len(arrays[ids])
    np.testing.assert_array_equal(made.inputs[name][0, :count], arrays[ids])
    assert not made.inputs[name][0, count:].any()


def test_text_to_image():
  """Ten steps of DPM-Solver++ for flow models, with guidance."""
  arrays, made = run()
  assert error(made.one, arrays["latents_out"]) < 1e-4
  np.testing.assert_allclose(made.images, arrays["image"], atol=1e-4)


def test_in_parallel():
  """At tolerance 0, ParaDiGMS ends where the sequential sampler does, to the bit."""
  peer_pipelines.check_in_parallel(run()[1], 10)


def test_instructions():
  """Only what leaves padding out takes one, and the first and last tokens are kept."""
  with pytest.raises(ValueError, match="instruction: only for a network such as SANA"):
    model_lib.with_instruction(load(FIXTURES / "tiny-sdxl"), "Draw:")
  model = model_lib.with_instruction(load(SANA), "a cat on the mat")
  count = model.lengths["text_encoder"]
  assert (count, model.negative_lengths["text_encoder"]) == (304, 300)  # of 6 tokens
  text = clip_text.Text(
    jnp.arange(count)[None, :, None], mask=jnp.ones((1, count), bool)
  )
  rows = model.unet.conditions({"text_encoder": text})["text"][0, :, 0]
  np.testing.assert_array_equal(rows, [0, *range(count - 299, count)])


def test_another_text_encoder():
  """One that does not leave padding out does not fit."""
  clip = load(FIXTURES / "tiny-sdxl").text_encoders["text_encoder"]
  parts = {"transformer": load(SANA).unet, "text_encoder": clip}
  (problem,) = fit.misfits(parts)
  assert problem == "the transformer does not take texts as text_encoder returns them"


@pytest.mark.parametrize(
  ("module", "fields", "message"),
  [
    (sana_transformer, {"qk_norm": "l2"}, "must be 'rms_norm_across_heads' or null"),
    (
      sana_transformer,
      {"cross_attention_dim": 1},
      "cross_attention_dim=1: must be att",
    ),
    (
      sana_transformer,
      {"patch_size": 3},
      "sample_size=32: must be a multiple of patch",
    ),
    (autoencoder_dc, {"in_channels": 4}, "in_channels=4: must be 3"),
    (
      autoencoder_dc,
      {"latent_channels": 3},
      "last one a multiple of latent_channels=3",
    ),
    (autoencoder_dc, {"encoder_layers_per_block": [2]}, "must have 6 values, one for"),
    (gemma_text, {"num_key_value_heads": 3}, "num_key_value_heads=3: must divide"),
    (gemma_text, {"rms_norm_eps": 1e-5}, "values not supported: rms_norm_eps=1e-05"),
  ],
)
def test_wrong_fields(module, fields, message):
  with pytest.raises(ValueError, match=message):
    module.from_config(fields)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"prediction_type": "epsilon"}, "must be one of flow_prediction"),
    ({"algorithm_type": "sde-dpmsolver++"}, "values not supported: algorithm_type="),
  ],
)
def test_wrong_schedules(fields, message):
  path = SANA / "scheduler" / "scheduler_config.json"
  config = json.loads(path.read_text())
  with pytest.raises(ValueError, match=message):
    scheduler.from_config(config | fields)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sprint(steps):
  """All noises are the peer's; an image is the last estimate of x0."""
  with np.load(SPRINT / f"expected_{steps}.npz") as stored:
    arrays = dict(stored)
  meta = json.loads(str(arrays["meta"]))
  model = model_lib.with_instruction(load(SPRINT), meta["instruction"])
  x, wanted = (np.moveaxis(arrays[k], 1, -1) for k in ("latents_in", "latents_out"))
  noise = np.moveaxis(arrays["noise"], 2, -1)
  tableau = scheduler.tableau(model.schedule, steps)
  predict, cond = sprint(meta["prompt"], meta["guidance_scale"])
  denoise = scheduler.denoiser(
    lambda x, time, cond: predict(model.params["unet"], x, time, cond),
    model.schedule,
    tableau,
  )

  def estimate(x, time) -> np.ndarray:
    return np.asarray(denoise(jnp.asarray(x), jnp.full(1, time, jnp.float32), cond))

  first = (tableau.init_std * x).astype(np.float32)
  found = run_recurrence(tableau, first, estimate, noise.astype(np.float32))
  assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@functools.cache
def sprint(prompt: str, scale: float):
  """Returns the compiled network of Sprint, and its conditions."""
  meta = json.loads(str(np.load(SPRINT / "expected_1.npz")["meta"]))
  model = model_lib.with_instruction(load(SPRINT), meta["instruction"])
  ids = {"text_encoder": model.instructed["text_encoder"].encode([prompt])}
  cond = dict(quickly(model.encode)(model.params, ids))
  cond["distilled_guidance"] = jnp.full(1, scale)
  return quickly(model.unet.apply), cond


def test_solvers_of_sprint():
  """Only its own, and it is for no other model."""
  schedule = load(SPRINT).schedule
  with pytest.raises(ValueError, match="name='ddim': .* take no other solver"):
    published_model.build_sampler(schedule, name="ddim", steps=2)
  with pytest.raises(
    ValueError, match="timestep_spacing='trailing': the model's scheduler has a g"
  ):
    published_model.build_sampler(
      schedule, name="consistency", steps=2, spacing="trailing"
    )
  for folder in (SANA, FIXTURES / "tiny-sdxl"):
    with pytest.raises(ValueError, match="name='consistency': .* SCMScheduler"):
      published_model.build_sampler(load(folder).schedule, name="consistency", steps=2)


@pytest.mark.slow
def test_published_sizes():
  """Those of the models' pages: 1.6, 0.3 and 2.6 billion."""
  folder = FIXTURES.parents[1] / "configs" / "published" / "sana_sprint"
  model = loading.abstract(loading.configs(str(folder)))
  counts = {k: sum(x.size for x in jax.tree.leaves(p)) for k, p in model.params.items()}
  assert counts == {
    "unet": 1_610_237_472,
    "vae": 312_250_275,
    "text_encoder": 2_614_341_888,
  }
  assert model.size == (1024, 1024)


@pytest.mark.slow
def test_job(tmp_path):
  """From a prompt to files, by the sampler of the config; speculation, too."""
  config = configs.load(str(FIXTURES.parents[1] / "configs/sana_sprint.py"), "missing")
  config.generate.update(folder=str(SPRINT), prompts="a cat", size=(8, 12))
  config.generate.update(dtype="float32", instruction="Draw:")
  config.sample.update(num=1, batch_size=8)
  assert "made 1 of 1" in generate.run(config, str(tmp_path / "a"))
  config.sampler.update(name="specconsistency", steps=4, window=2)
  assert "made 1 of 1" in generate.run(config, str(tmp_path / "b"))
