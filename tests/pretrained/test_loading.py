"""Whole folders of the diffusers format: what they give, and what is refused."""

import functools
import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES

from sdiff_jax.diffusion import guidance, parameterizations
from sdiff_jax.pretrained.diffusers import loading, scheduler
from sdiff_jax.samplers import paradigms, sequential
from sdiff_jax.types import UserError

SD2, CHURCH = FIXTURES / "tiny-sd2", FIXTURES / "tiny-ddpm-church"
EPS = {"prediction_type": "epsilon", "timestep_spacing": "trailing"}
EPS |= {"set_alpha_to_one": True, "steps_offset": 0}

# Compiled once for one call: the time is the compiler's.
quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.cache
def sd2() -> loading.Model:
  return loading.load(str(SD2))


@functools.partial(jax.jit, static_argnames="kind")
def guided_prediction(params, x, time, level, cond, empty, kind):
  """The denoised of guidance 7.5; level is (alpha, sigma)."""
  net = functools.partial(sd2().unet.apply, params)
  net = guidance.classifier_free(net, 7.5, guidance.without_text({"text": empty}))
  return parameterizations.denoiser(net, kind, lambda _: level)(x, time, cond)


def sample(schedule: scheduler.Schedule, x, text, empty):
  """Returns the last latents [B, h, w, C] of 10 guided steps."""
  params, level_of = sd2().params["unet"], parameterizations.vp(schedule.abar)

  def denoiser(x, time, cond):
    level = level_of(time)
    return guided_prediction(params, x, time, level, cond, empty, schedule.kind)

  table = scheduler.tableau(schedule, 10)
  keys = sequential.keys_from_seeds(np.arange(len(x)))
  return sequential.sample(denoiser, table, x, keys, {"text": text})


@pytest.mark.parametrize(
  ("name", "changed"),
  [pytest.param("base", {}, marks=pytest.mark.slow), ("eps_trailing", EPS)],
)
def test_guided_latents(fixture, name, changed):
  """Ten steps of DDIM with guidance 7.5, by v and by eps."""
  arrays = fixture("diffusers_networks")
  arrays = {k.removeprefix("tiny_sd2_ddim_cfg/"): v for k, v in arrays.items()}
  config = json.loads((SD2 / "scheduler" / "scheduler_config.json").read_text())
  schedule = scheduler.from_config(config | changed)
  np.testing.assert_array_equal(
    scheduler.tableau(schedule, 10).time, arrays[f"{name}/timesteps"]
  )
  states = np.moveaxis(arrays[f"{name}/latents_traj"], 1, -1)
  text, empty = (arrays[f"{k}prompt_embeds"] for k in ("", "negative_"))
  first, text, empty = (jnp.asarray(a) for a in (states[:1], text, empty[0]))
  found = sample(schedule, first, text, empty)
  assert np.abs(found[0] - states[-1]).max() < 1e-5 * np.abs(states[-1]).max()


@pytest.mark.parametrize(
  "solver",
  [
    pytest.param("ddpm", marks=pytest.mark.slow),
    "ddim",
    pytest.param("dpmpp2m", marks=pytest.mark.slow),
  ],
)
def test_in_parallel(solver):
  """ParaDiGMS at tolerance 0 ends where the sequential sampler does."""
  model, rng = sd2(), np.random.default_rng(0)
  apply = functools.partial(model.unet.apply, model.params["unet"])
  table = scheduler.tableau(model.schedule, 6, solver)
  denoiser = scheduler.denoiser(apply, model.schedule, table, solver)
  keys = sequential.keys_from_seeds(np.arange(2))
  x = sequential.sample_prior(table, keys, (4, 4, 4))
  cond = {"text": jnp.asarray(rng.normal(size=(2, 3, 24)), jnp.float32)}

  @quickly
  def run(x, keys, cond):
    one = sequential.sample(denoiser, table, x, keys, cond)
    args = denoiser, table, x, keys, cond
    return one, paradigms.run(*args, window=4, tolerance=0.0)

  one, many = run(x, keys, cond)
  np.testing.assert_allclose(many.x, one, rtol=1e-5, atol=1e-5)
  assert jnp.std(one - x) > 0.1


def test_text_to_image():
  """From a prompt to latents and pixels, as the whole pipeline of diffusers."""
  with np.load(SD2 / "expected_text_to_image.npz") as arrays:
    wanted = dict(arrays)
  meta, model = json.loads(str(wanted["meta"])), sd2()
  ids = model.tokenizer.encode([meta["prompt"], meta["negative_prompt"]])
  encode = functools.partial(model.text_encoder.apply, model.params["text_encoder"])
  text = jax.jit(encode)(jnp.asarray(ids)).hidden
  x = jnp.asarray(np.moveaxis(wanted["latents_in"], 1, -1))
  latents = sample(model.schedule, x, text[:1], text[1])
  expected = np.moveaxis(wanted["latents_out"], 1, -1)
  assert np.abs(latents - expected).max() < 1e-4 * np.abs(expected).max()
  decode = functools.partial(model.vae.decode, model.params["vae"])
  images = jax.jit(decode)(latents / model.vae.scaling)
  pixels = np.clip(np.asarray(images) / 2 + 0.5, 0, 1)
  np.testing.assert_allclose(pixels, wanted["image"], atol=1e-4)


def test_church():
  """A folder without text; its parts may all lie in one folder."""
  model = loading.load(str(CHURCH), dtype="bfloat16")
  assert (model.vae, model.text_encoder, model.tokenizer) == (None, None, None)
  assert [*model.params] == ["unet"]
  assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
  assert model.unet.shape == (16, 16, 3)
  assert model.schedule[1:7] == ("eps", "ddpm", "leading", 0, 1.0, 1.0)


@pytest.mark.slow
def test_ddim_of_church(fixture):
  """20 steps that clip x0 and keep the noise; without keeping it they end 2 away.

  The peer's steps are of float32, whose rounding these weights make 1e3 times larger:
  float64 ends 1.8e-3 away.
  """
  arrays = fixture("diffusers_networks")
  first, last = (
    jnp.asarray(np.moveaxis(arrays[f"unet2d_ddpm_church_like/{k}"], 1, -1))
    for k in ("sample", "ddim_final")
  )
  model = loading.load(str(CHURCH))
  table = scheduler.tableau(model.schedule, 20, "ddim")
  apply = functools.partial(model.unet.apply, model.params["unet"])
  denoiser = scheduler.denoiser(apply, model.schedule, table, "ddim")
  keys = sequential.keys_from_seeds(np.arange(2))
  found = quickly(lambda x: sequential.sample(denoiser, table, x, keys, None))(first)
  np.testing.assert_allclose(found, last, atol=5e-3)


@pytest.fixture
def copy(tmp_path):
  """Returns a copy of a folder, which a test may damage."""
  return lambda folder: shutil.copytree(folder, tmp_path / folder.name)


def edit(path, **fields) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_one_folder_for_all(copy):
  folder = copy(CHURCH)
  for part in ("unet", "scheduler"):
    for file in (folder / part).iterdir():
      file.rename(folder / file.name)
    (folder / part).rmdir()
  found = loading.load(str(folder)).params
  wanted = loading.load(str(CHURCH)).params
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_all_that_does_not_fit_is_listed(copy):
  folder = copy(SD2)
  edit(folder / "unet" / "config.json", more=1, class_embed_type="timestep")
  edit(folder / "vae" / "config.json", act_fn="relu")
  edit(folder / "scheduler" / "scheduler_config.json", prediction_type="flow")
  with pytest.raises(UserError) as error:
    loading.load(str(folder))
  message = str(error.value)
  for part in (
    "unet/config.json: unknown fields: more; values not supported: class_embed_type=",
    "vae/config.json: values not supported: act_fn='relu'",
    "scheduler/scheduler_config.json: prediction_type='flow': must be one of",
  ):
    assert part in message
  assert "\n" not in message


def test_weights_that_do_not_fit_are_listed(copy):
  folder = copy(SD2)
  edit(folder / "unet" / "config.json", cross_attention_dim=20)
  edit(folder / "vae" / "config.json", layers_per_block=2)
  with pytest.raises(UserError) as error:
    loading.load(str(folder))
  message = str(error.value)
  assert (
    "the unet takes text embeddings of size 20, the text_encoder returns 24" in message
  )
  assert "attn2.to_k.weight (24, 16) for (20, 16)" in message
  vae_weights = "vae/diffusion_pytorch_model.safetensors: the tensors do not fit"
  assert f"{vae_weights} the network: missing: decoder.up_" in message


def cut(path) -> None:
  path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda f: cut(f / "vae" / "diffusion_pytorch_model.safetensors"), "is damaged"),
    (
      lambda f: (f / "text_encoder" / "model.safetensors").unlink(),
      "text_encoder has no weights: there is none of diffusion_pytorch_model.safe",
    ),
    (lambda f: (f / "model_index.json").unlink(), "model_index.json does not exist"),
    (
      lambda f: (f / "unet" / "config.json").write_text("{"),
      "config.json is not valid JSON",
    ),
    (lambda f: (f / "vae" / "config.json").write_text("[]"), "damaged: not a dict"),
    (lambda f: edit(f / "model_index.json", unet="no"), "names no unet"),
    (
      lambda f: edit(f / "model_index.json", unet=["diffusers", "Flux"]),
      "unet: Flux is none of UNet2DConditionModel, UNet2DModel",
    ),
    (
      lambda f: edit(f / "unet" / "config.json", _class_name="Flux"),
      r"config.json: \['Flux'\] is none of UNet2DConditionModel",
    ),
  ],
)
def test_damaged_folders(copy, damage, message):
  folder = copy(SD2)
  damage(folder)
  with pytest.raises(UserError, match=message):
    loading.load(str(folder))


def test_a_tokenizer_of_another_model(copy):
  folder = copy(SD2)
  path = folder / "tokenizer" / "tokenizer.json"
  found = json.loads(path.read_text())
  found["model"]["vocab"] |= {"extra": 63, "more": 64}
  path.write_text(json.dumps(found))
  with pytest.raises(UserError, match="has 65 tokens, the text encoder 64: they do no"):
    loading.load(str(folder))


def test_folders_on_the_hub(monkeypatch):
  """Only a path that starts with hf:// is fetched, and of it what is read."""
  asked = []
  stem = "unet/diffusion_pytorch_model"
  files = ["model_index.json", "README.md", f"{stem}.bin", f"{stem}.safetensors"]
  files += ["vae/diffusion_pytorch_model.fp16.safetensors", "all.ckpt"]

  def fetch(name, allow_patterns):
    asked.append((name, allow_patterns))
    return str(CHURCH)

  def names(name):
    if name == "no/model":
      raise OSError("404")
    return files

  hub = types.SimpleNamespace(snapshot_download=fetch, list_repo_files=names)
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  assert loading.load("hf://google/ddpm").unet.shape == (16, 16, 3)
  assert asked.pop() == ("google/ddpm", [files[0], files[3], files[4]])
  assert "unet" in loading.configs("hf://google/ddpm")
  assert asked.pop() == ("google/ddpm", [files[0]])
  with pytest.raises(UserError, match="hf://no/model: the download failed: 404"):
    loading.load("hf://no/model")
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(UserError, match="needs the package huggingface_hub: pip"):
    loading.load("hf://google/ddpm")
  with pytest.raises(UserError, match="google/ddpm: no such folder"):
    loading.load("google/ddpm")
