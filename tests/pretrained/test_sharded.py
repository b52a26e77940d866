"""Weights as they come: shards with an index, variants, prefixes of wrappers."""

import functools
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as original
from conftest import FIXTURES

from sdiff_jax.distributed import sharding
from sdiff_jax.pretrained.diffusers import loading, weights
from sdiff_jax.pretrained.files import safetensors_file, state_dict
from sdiff_jax.types import UserError

PART = FIXTURES / "tiny-ddpm-church" / "unet"
STEM = "diffusion_pytorch_model"
FILE, INDEX = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"


@pytest.fixture(scope="module")
def network():
  return loading.network(str(PART))


@pytest.fixture(scope="module")
def wanted(network):
  return weights.parameters(str(PART), network)


@pytest.fixture
def part(tmp_path):
  """A folder with a config and without weights."""
  shutil.copy(PART / "config.json", tmp_path)
  return tmp_path


def tensors() -> dict[str, np.ndarray]:
  return state_dict.read(str(PART / FILE))


def write_shards(folder: pathlib.Path, variant: str = "", count: int = 3) -> None:
  """Writes the weights as shards with an index."""
  names = sorted(tensors())
  files = [
    f"{STEM}{variant}-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)
  ]
  where = {name: files[k % count] for k, name in enumerate(names)}
  for file in files:
    part = {k: v for k, v in tensors().items() if where[k] == file}
    original.save_file(part, folder / file)
  text = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
  (folder / f"{STEM}.safetensors.index{variant}.json").write_text(text)


@pytest.mark.parametrize("variant", ["", ".fp16", ".bf16"])
def test_shards(part, network, wanted, variant):
  write_shards(part, variant)
  found = weights.parameters(str(part), network)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_the_plain_file_comes_before_variants(part, network, wanted):
  shutil.copy(PART / FILE, part)
  zeros = {k: np.zeros_like(v) for k, v in tensors().items()}
  original.save_file(zeros, part / f"{STEM}.fp16.safetensors")
  found = weights.parameters(str(part), network)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  (part / FILE).unlink()
  found = weights.parameters(str(part), network)
  assert not any(np.any(x) for x in jax.tree.leaves(found))


@pytest.mark.parametrize(
  "rename",
  [
    lambda name: f"module.{name}",
    lambda name: f"_orig_mod.{name}",
    lambda name: f"_orig_mod.module.{name}",
    lambda name: name.replace("down_blocks.0.", "down_blocks.0._orig_mod."),
  ],
)
def test_prefixes_of_wrappers(part, network, wanted, rename):
  original.save_file({rename(k): v for k, v in tensors().items()}, part / FILE)
  found = weights.parameters(str(part), network)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_float8_is_converted(part, network, wanted, capsys):
  """8 bits with 3 of them after the point are off by a 16th at most; a line says so.

  Weights that need a factor, which a tensor beside them holds, are refused.
  """
  narrow = {k: v.astype(ml_dtypes.float8_e4m3fn) for k, v in tensors().items()}
  original.save_file(narrow, part / FILE)
  found = weights.parameters(str(part), network, dtype="bfloat16")
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert x.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(x.astype(np.float32), y, rtol=1 / 16, atol=1e-3)
  said = f"{part / FILE}: weights of float8_e4m3fn become bfloat16\n"
  assert capsys.readouterr().err == said
  scale = {"conv_in.weight_scale": np.ones(1, np.float32)}
  original.save_file(narrow | scale, part / FILE)
  with pytest.raises(UserError, match="left over: conv_in.weight_scale"):
    weights.parameters(str(part), network)


def test_two_tensors_of_one_name(part, network):
  twice = tensors() | {f"module.{k}": v for k, v in tensors().items()}
  original.save_file(twice, part / FILE)
  with pytest.raises(UserError, match="two tensors have the name .*, with a prefix"):
    weights.parameters(str(part), network)


def damage_index(change) -> object:
  def damage(folder: pathlib.Path) -> None:
    content = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(change(content)))

  return damage


def moved(content: dict) -> dict:
  """Returns an index that exchanges the shards of two tensors."""
  places = content["weight_map"]
  a, b, *_ = places
  return content | {"weight_map": places | {a: places[b], b: places[a]}}


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (
      lambda f: (f / f"{STEM}-00002-of-00003.safetensors").unlink(),
      "does not exist, b",
    ),
    (lambda f: (f / INDEX).write_text("{"), "index.json is not valid JSON"),
    (damage_index(lambda c: {}), "index.json lacks|weight_map"),
    (damage_index(lambda c: {"weight_map": {}}), "weight_map"),
    (damage_index(lambda c: {"weight_map": {"a": "../x.safetensors"}}), "weight_map"),
    (damage_index(lambda c: {"weight_map": {"a": 1}}), "weight_map"),
    (damage_index(moved), "lacks the tensor conv"),
  ],
)
def test_damaged_indices(part, network, damage, message):
  write_shards(part)
  damage(part)
  with pytest.raises(UserError, match=message) as error:
    weights.parameters(str(part), network)
  assert "\n" not in str(error.value)


def test_a_shard_that_is_cut_while_it_is_read(part, network):
  write_shards(part)
  shard = part / f"{STEM}-00002-of-00003.safetensors"
  lazy = state_dict.stored(str(shard))
  shard.write_bytes(shard.read_bytes()[:-8])
  last = max(lazy.values(), key=lambda x: x.position)
  with pytest.raises(EOFError, match="a tensor ends too early"):
    last.read()
  with pytest.raises(UserError, match="is damaged"):
    weights.parameters(str(part), network)


def test_only_headers_are_read_before_names_and_shapes_fit(part, network, monkeypatch):
  write_shards(part)
  read = []
  whole = safetensors_file.StoredTensor.read

  def count(tensor):
    read.append(tensor)
    return whole(tensor)

  monkeypatch.setattr(safetensors_file.StoredTensor, "read", count)
  weights.parameters(str(part), network)
  assert len(read) == len(tensors())
  read.clear()
  config = json.loads((part / "config.json").read_text())
  (part / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
  with pytest.raises(UserError, match="the tensors do not fit the network: missing"):
    weights.parameters(str(part), loading.network(str(part)))
  assert not read


def test_tensors_go_to_their_devices_one_by_one(part, network, wanted):
  """Each with the sharding of the mesh."""
  write_shards(part)
  mesh = sharding.make_mesh(fsdp=8)
  place = functools.partial(sharding.state, mesh=mesh)
  found = weights.parameters(str(part), network, place=place)
  for x, y, where in zip(
    *map(jax.tree.leaves, (found, wanted, place(wanted))), strict=True
  ):
    assert x.sharding == where
    np.testing.assert_array_equal(x, y)


def test_what_is_fetched():
  files = ["a/config.json", f"a/{FILE}", f"a/{STEM}.fp16.safetensors"]
  assert weights.to_fetch(files) == [f"a/{FILE}"]
  shards = [f"b/model.fp16-{k:05d}-of-00002.safetensors" for k in (1, 2)]
  others = ["b/model.safetensors.index.fp16.json", "b/pytorch_model.bin"]
  more = [f"b/model-{k:05d}-of-00002.safetensors" for k in (1, 2)]
  assert weights.to_fetch([*others, *shards, *more]) == shards
