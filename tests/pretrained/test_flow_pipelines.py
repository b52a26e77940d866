"""Whole folders of Stable Diffusion 3 and Flux: from a prompt to latents and pixels."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peer_pipelines
import pytest
from conftest import FIXTURES
from peer_networks import error

from sdiff_jax import config as configs
from sdiff_jax.experiment import published_model
from sdiff_jax.io import image_io
from sdiff_jax.jobs import generate
from sdiff_jax.pretrained.diffusers import loading, scheduler
from sdiff_jax.types import UserError

SD3, FLUX = FIXTURES / "tiny-sd3", FIXTURES / "tiny-flux"


@functools.cache
def load(folder) -> loading.Model:
  return loading.load(str(folder))


@functools.cache
def run(folder, file: str) -> tuple:
  """Returns the peer's arrays, and what our pipeline makes."""
  arrays, meta = peer_pipelines.arrays(folder / file)
  scale = meta["guidance_scale"]
  made = peer_pipelines.run(
    load(folder),
    arrays["latents_in"],
    name="paraddim",
    steps=meta["steps"],
    guidance_scale=scale if folder == SD3 else meta.get("true_cfg_scale", 1.0),
    prompts=[meta["prompt"]],
    negative_prompt=meta["negative_prompt"],
    distilled_guidance=scale,
  )
  return arrays, made


CASES = pytest.mark.parametrize(
  ("folder", "file"),
  [
    pytest.param(SD3, "expected.npz", marks=pytest.mark.slow),
    pytest.param(FLUX, "expected.npz", marks=pytest.mark.slow),
    (FLUX, "expected_cfg.npz"),
  ],
)


@CASES
def test_text_to_image(folder, file):
  """Ten steps with guidance: a negative prompt, a distilled scale, and both."""
  arrays, made = run(folder, file)
  for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
    if name in arrays:
      found = made.inputs[name.replace("tokenizer", "tokens")]
      np.testing.assert_array_equal(found[:, :12], arrays[name])
  assert error(made.one, arrays["latents_out"]) < 1e-4
  np.testing.assert_allclose(made.images, arrays["image"], atol=1e-4)


@CASES
def test_in_parallel(folder, file):
  """At tolerance 0, ParaDiGMS ends where the sequential sampler does, to the bit."""
  peer_pipelines.check_in_parallel(run(folder, file)[1], 10)


def test_shift_by_resolution():
  """More tokens, more noise."""
  small = loading.with_shape(load(FLUX), (4, 4, 4)).schedule
  large = loading.with_shape(load(FLUX), (16, 16, 4)).schedule
  assert small.spacing == "trailing"
  at = [scheduler.tableau(s, 4).time[1] for s in (small, large)]
  assert at[0] < at[1]


def test_a_network_of_two_times_needs_both():
  found = loading.configs(str(SD3))
  parts = {"transformer": found["transformer"] | {"end_time": True}}
  parts["scheduler"] = {"_class_name": "FlowMapEulerDiscreteScheduler", "shift": 3.0}
  model, config = loading.abstract(parts), configs.base()
  config.sampler.update(name="ddim", steps=4)
  with pytest.raises(UserError, match="name='ddim': the network takes the end time"):
    published_model.with_sampler(config, model)
  config.sampler.update(name="paraflow_map", window=2)
  _, sampler = published_model.with_sampler(config, model)
  np.testing.assert_allclose(sampler.tableau.end_time, [0.9, 0.75, 0.5, 0], atol=1e-12)


@pytest.mark.slow
def test_without_the_third_encoder(tmp_path):
  """Stable Diffusion 3 then takes zeros in its place."""
  folder = shutil.copytree(SD3, tmp_path / "sd3")
  index = json.loads((folder / "model_index.json").read_text())
  index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
  (folder / "model_index.json").write_text(json.dumps(index))
  model = loading.load(str(folder))
  assert [*model.text_encoders] == ["text_encoder", "text_encoder_2"]
  tokens = {name: jnp.zeros((1, 12), jnp.int32) for name in model.text_encoders}
  cond = model.encode(model.params, tokens)
  assert cond["text"].shape == (1, 12 + 256, 20)
  np.testing.assert_array_equal(cond["text"][:, 12:], 0)


def edit(path, **fields) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (
      lambda f: edit(f / "model_index.json", text_encoder_2=[None, None]),
      "the transformer takes the texts of text_encoder_2, which is not there",
    ),
    (
      lambda f: edit(f / "model_index.json", tokenizer_2=[None, None]),
      "model_index.json names no tokenizer of text_encoder_2",
    ),
    (
      lambda f: edit(f / "transformer" / "config.json", joint_attention_dim=16),
      "the transformer takes text embeddings of size 16, the text_encoder, text_enc",
    ),
    (
      lambda f: (f / "tokenizer_2" / "tokenizer.json").unlink(),
      "tokenizer.json does not exist: the tokenizers of T5 and Gemma are read from it",
    ),
    (
      lambda f: (f / "tokenizer_2" / "tokenizer.json").write_text("{}"),
      "holds no tokenizer of T5",
    ),
    (
      lambda f: edit(f / "text_encoder_2" / "config.json", feed_forward_proj="silu"),
      "feed_forward_proj='silu': must be one of relu, gated-gelu",
    ),
  ],
)
def test_damaged_folders(tmp_path, damage, message):
  folder = shutil.copytree(FLUX, tmp_path / "flux")
  damage(folder)
  with pytest.raises(UserError, match=message):
    loading.load(str(folder))


def test_abstract_models():
  """The config files alone give the shapes of all weights."""
  model = loading.abstract(loading.configs(str(SD3)))
  loaded = load(SD3).params
  assert jax.tree.map(lambda x: x.shape, model.params) == jax.tree.map(
    lambda x: x.shape, loaded
  )
  assert model.lengths == {
    "text_encoder": 12,
    "text_encoder_2": 12,
    "text_encoder_3": 256,
  }


@pytest.mark.parametrize(
  ("name", "million"),
  [("stable_diffusion3.5_large", 8146.281), ("flux_dev", 11901.408)],
)
@pytest.mark.slow
def test_published_sizes(name, million):
  """Those of the models' pages; the first with its table of positions."""
  folder = FIXTURES.parents[1] / "configs" / "published" / name
  model = loading.abstract(loading.configs(str(folder)), dtype="bfloat16")
  count = sum(x.size for x in jax.tree.leaves(model.params["unet"]))
  assert count / 1e6 == pytest.approx(million, abs=1e-3)
  assert model.schedule.tokens == 4096


@pytest.mark.slow
def test_images_of_a_size(tmp_path):
  """The same command finds its images, and another size is refused."""
  config = configs.base()
  config.generate.update(folder=str(FLUX), prompts="a cat", size=(16, 8))
  config.sampler.update(name="paraddim", steps=2, window=2, tolerance=0.1)
  config.sample.update(num=1, batch_size=8)
  assert "made 1 of 1" in generate.run(config, str(tmp_path))
  assert image_io.about(tmp_path / "images" / "00000.png")
  assert "made 0 of 1" in generate.run(config, str(tmp_path))
  config.generate.size = (8, 8)
  with pytest.raises(UserError, match="made with other settings: generate.size"):
    generate.run(config, str(tmp_path))
  config.generate.size = (6, 8)
  with pytest.raises(UserError, match="size=.6, 8.: must be height and width, multip"):
    generate.run(config, str(tmp_path))
