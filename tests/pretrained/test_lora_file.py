"""Adapters in files: as peft computes with them, and back."""

import json

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy as original
from conftest import FIXTURES

from sdiff_jax import config as configs
from sdiff_jax.experiment import published_model
from sdiff_jax.models.layers import lora
from sdiff_jax.pretrained.diffusers import loading, lora_file, weights
from sdiff_jax.types import UserError

FOLDER, UNET = FIXTURES / "tiny-lora", str(FIXTURES / "tiny-sd2" / "unet")
FILE = str(FOLDER / lora_file.FILE)


@pytest.fixture(scope="module")
def unet():
  net = loading.network(UNET)
  return net, weights.parameters(UNET, net)


@pytest.fixture(scope="module")
def adapters(unet):
  return lora_file.load(FILE, unet[1], part="unet")


def test_outputs_are_those_of_peft(unet, adapters):
  """Old and new names, matrices and convolutions, alpha = 3 of rank 2."""
  net, params = unet
  with np.load(FOLDER / "expected.npz") as arrays:
    x, text, time = (arrays[k] for k in ("x", "text", "time"))
    expected = np.moveaxis(arrays["output"], 1, -1)
  merged = lora.merge(params, adapters, 1.0)
  x = np.moveaxis(x, 1, -1)
  found = jax.jit(net.apply)(merged, x, time, {"text": text})
  assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_file_comes_back(unet, adapters, tmp_path):
  """The factor of the adapters is in B, so it is 1 for every reader."""
  path = str(tmp_path / lora_file.FILE)
  lora_file.save(path, adapters, part="unet", scale=0.5)
  again = lora_file.load(path, unet[1], part="unet")
  assert jax.tree.structure(again) == jax.tree.structure(adapters)
  for where, x in jax.tree.leaves_with_path(again):
    kind, expected = where[-1].key, adapters
    for key in where:
      expected = expected[key.key]
    scale = 0.5 if kind == lora.B else 1.0
    np.testing.assert_array_equal(x, scale * np.asarray(expected))
  before, after = original.load_file(FILE), original.load_file(path)
  present = {lora_file._present(k): x.shape for k, x in before.items()}
  assert {k: x.shape for k, x in after.items()} == present


def test_alpha_of_single_weights(unet, adapters, tmp_path):
  """Tensors "....alpha", as other tools write them, in place of the header's."""
  tensors = original.load_file(FILE)
  name = "unet.mid_block.resnets.0.conv1"
  tensors[f"{name}.alpha"] = np.array(8, np.float32)
  path = tmp_path / "x.safetensors"
  original.save_file(tensors, path)
  found = lora_file.load(str(path), unet[1], part="unet")
  own = found["mid_block.resnets.0"]["conv1"]["kernel"][lora.B]
  np.testing.assert_allclose(own.T, 4 * tensors[f"{name}.lora_B.weight"][..., 0, 0])
  other = found["mid_block.resnets.1"]["conv1"]["kernel"][lora.B]
  expected = tensors["unet.mid_block.resnets.1.conv1.lora_B.weight"][..., 0, 0]
  np.testing.assert_array_equal(other.T, expected)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"unet.nowhere.to_q.lora_A.weight": (2, 16)},
      "LoRA of another network: left over",
    ),
    (
      {"unet.mid_block.attentions.0.proj_in.lora_A.weight": (2, 16)},
      "of another shape: unet.mid_block",
    ),
    ({"text_encoder.q_proj.lora_A.weight": (2, 16)}, "left over: text_encoder.q_proj"),
  ],
)
def test_adapters_of_another_network(unet, tmp_path, change, message):
  tensors = {lora_file._present(k): v for k, v in original.load_file(FILE).items()}
  tensors |= {k: np.zeros(shape, np.float32) for k, shape in change.items()}
  path = tmp_path / "x.safetensors"
  original.save_file(tensors, path)
  with pytest.raises(UserError, match=message) as error:
    lora_file.load(str(path), unet[1], part="unet")
  assert "\n" not in str(error.value)


def test_other_kinds_of_adapters(unet, tmp_path):
  with safetensors.safe_open(FILE, "np") as file:
    config = json.loads(file.metadata()["lora_adapter_metadata"])
  about = {"lora_adapter_metadata": json.dumps(config | {"unet.use_dora": True})}
  path = tmp_path / "x.safetensors"
  original.save_file(original.load_file(FILE), path, about)
  with pytest.raises(UserError, match="use_dora is not supported"):
    lora_file.load(str(path), unet[1], part="unet")


def generation(folder: str):
  config = configs.base()
  config.generate.update(folder=str(FIXTURES / folder), prompts="a cat", lora=FILE)
  config.sampler.update(name="ddim", steps=2)
  return config


def test_generate_adds_the_adapters(unet, adapters):
  model, _ = published_model.from_config(generation("tiny-sd2"))
  expected = lora.merge(unet[1], adapters, 1.0)
  jax.tree.map(np.testing.assert_array_equal, model.params["unet"], expected)


def test_generate_refuses_adapters_of_another_network():
  with pytest.raises(UserError, match="fit the unet; it is a LoRA of another network"):
    published_model.from_config(generation("tiny-ddpm-church"))
