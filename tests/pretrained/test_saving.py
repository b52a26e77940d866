"""Folders that are written: what the reader and the originals read is what was saved."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy as original
from conftest import FIXTURES

from sdiff_jax.pretrained.diffusers import fit, loading, networks, saving, weights
from sdiff_jax.pretrained.files import (
  config_fields,
  safetensors_file,
  state_dict,
  to_tensors,
)
from sdiff_jax.types import UserError

FOLDERS = ["tiny-sd2", "tiny-ddpm-church", "tiny-sd3"]
FOLDERS += [pytest.param("tiny-flux", marks=pytest.mark.slow)]


def test_the_original_reads_a_safetensors_file(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {
    name: np.asarray(rng.integers(-9, 9, (2, 3)), dtype)
    for name, dtype in safetensors_file.DTYPES.items()
    if not name.startswith("F8")
  }
  tensors |= {"empty": np.zeros((0, 4), np.float32), "one": np.float64(3.5)}
  tensors["strided"] = np.arange(12.0).reshape(3, 4).T
  path = tmp_path / "x.safetensors"
  safetensors_file.write(path, tensors, {"format": "pt"})
  found = original.load_file(path)
  assert found.keys() == tensors.keys()
  for name, x in tensors.items():
    assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
    np.testing.assert_array_equal(found[name], x)
  np.testing.assert_equal(state_dict.read(str(path)), found)
  with safetensors_open(path) as file:
    assert file.metadata() == {"format": "pt"}


def safetensors_open(path):
  import safetensors

  return safetensors.safe_open(path, "np")


def test_a_type_that_the_format_lacks(tmp_path):
  with pytest.raises(ValueError, match="tensors: x has the type complex128"):
    safetensors_file.write(tmp_path / "x", {"x": np.zeros(1, complex)})
  assert not any(tmp_path.iterdir())


def test_from_params_inverts_match_params():
  """Random trees: a convolution, a matrix, a 1x1 convolution as a matrix, a table."""
  rng = np.random.default_rng(0)
  shapes = {"c.kernel": (3, 2, 5, 7), "m.kernel": (4, 6), "e.embedding": (5, 3)}
  shapes |= {"p.kernel": (4, 6, 1, 1), "b.bias": (3,), "g.gain": ()}
  tensors = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
  like = {
    "c": {"kernel": np.zeros((5, 7, 2, 3), np.float32)},
    "m": {"kernel": np.zeros((6, 4), np.float32)},
    "p": {"kernel": np.zeros((6, 4), np.float32)},
    "e": {"embedding": np.zeros((5, 3), np.float32)},
    "b": {"bias": np.zeros(3, np.float32)},
    "g": {"gain": np.zeros((), np.float32)},
  }
  params = state_dict.match_params(tensors, like, ".".join)
  back = to_tensors.from_params(params, ".".join, {"p.kernel": (4, 6, 1, 1)})
  assert back.keys() == tensors.keys()
  for name, x in tensors.items():
    np.testing.assert_array_equal(back[name], x)
  with pytest.raises(ValueError, match=r"shapes: m.kernel is \(4, 6\)"):
    to_tensors.from_params(params, ".".join, {"m.kernel": (4, 5)})


def rewritten(name: str, to: str) -> dict[str, saving.Part]:
  """Returns the parts of a fixture with weights from its parameters, after saving."""
  folder = str(FIXTURES / name)
  model, (index, parts) = loading.load(folder), saving.read(folder)
  configs = loading.configs(folder)
  for part in {*loading.PARTS} & parts.keys():
    params = model.params["unet" if part in fit.PREDICTORS else part]
    shapes = saving.shapes(f"{folder}/{part}")
    written = saving.network(configs[part], params, shapes=shapes)
    from_names = saving.network(configs[part], params).tensors
    assert {k: x.shape for k, x in from_names.items()} == {
      k: x.shape for k, x in written.tensors.items()
    }
    assert (written.library, written.class_name) == parts[part][:2]
    parts[part] = written._replace(folder=parts[part].folder)
  saving.save(to, index, parts)
  return parts


@pytest.mark.parametrize(("linear", "shape"), [(True, (3, 2)), (False, (3, 2, 1, 1))])
def test_projections_of_a_unet_are_convolutions_unless_it_says_no(linear, shape):
  config = {"_class_name": "UNet2DConditionModel", "use_linear_projection": linear}
  params = {"a": {"proj_in": {"kernel": np.zeros((2, 3), np.float32)}}}
  written = saving.network(config, params).tensors
  assert {k: x.shape for k, x in written.items()} == {"a.proj_in.weight": shape}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_comes_back_to_the_bit(name, tmp_path):
  """All names, shapes and values of the weights, the index, and the tokenizers."""
  folder, to = FIXTURES / name, tmp_path / "out"
  parts = rewritten(name, str(to))
  before = json.loads((folder / "model_index.json").read_text())
  assert json.loads((to / "model_index.json").read_text()) == before
  for part, value in parts.items():
    if not value.tensors:
      continue
    _, stored = weights.stored(str(folder / part))
    expected = {networks.present_name(k): x for k, x in stored.items()}
    expected.pop(networks.POSITIONS, None)
    if "shared.weight" in expected:
      expected.pop(networks.TIED, None)
    found = original.load_file(
      to / part / f"{saving.LIBRARIES[value.library]}.safetensors"
    )
    assert found.keys() == expected.keys()
    for tensor, x in found.items():
      np.testing.assert_array_equal(x, expected[tensor].read())
    config = json.loads((to / part / "config.json").read_text())
    assert not {"dtype", "torch_dtype"} & config.keys()
  for file in folder.glob("tokenizer*/*"):
    assert (to / file.relative_to(folder)).read_bytes() == file.read_bytes()


def test_copied_parts_lose_the_names_of_their_variants(tmp_path):
  index, parts = saving.read(str(FIXTURES / "tiny-sd3"))
  saving.save(str(tmp_path), index, parts)
  assert not [*tmp_path.rglob("*fp16*")]
  for part in {*loading.PARTS} & parts.keys():
    old, new = (
      weights.stored(str(f / part))[1] for f in (FIXTURES / "tiny-sd3", tmp_path)
    )
    assert old.keys() == new.keys()
    for name, x in old.items():
      np.testing.assert_array_equal(x.read(), new[name].read())


def test_copied_shards_keep_their_names(tmp_path):
  unet = FIXTURES / "tiny-sd2" / "unet"
  source = tmp_path / "unet"
  source.mkdir()
  shutil.copy(unet / "config.json", source)
  tensors = state_dict.read(str(unet / "diffusion_pytorch_model.safetensors"))
  halves = [[*tensors][::2], [*tensors][1::2]]
  places = {}
  for k, names in enumerate(halves):
    file = f"diffusion_pytorch_model-0000{k + 1}-of-00002.safetensors"
    safetensors_file.write(source / file, {n: tensors[n] for n in names})
    places |= dict.fromkeys(names, file)
  index = source / "diffusion_pytorch_model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": places}))
  part = saving.Part("diffusers", "UNet2DConditionModel", str(source))
  saving.save(str(tmp_path / "out"), {}, {"unet": part})
  assert saving.shapes(str(tmp_path / "out" / "unet")) == saving.shapes(str(unet))


def test_an_index_without_its_folder(tmp_path):
  index = {"unet": ["diffusers", "UNet2DModel"]}
  (tmp_path / "model_index.json").write_text(json.dumps(index))
  with pytest.raises(UserError, match="names unet: no such folder"):
    saving.read(str(tmp_path))


def test_numbers_that_json_does_not_have_come_back(tmp_path):
  """As Python's JSON has them, by which diffusers reads; a scheduler is one of them."""
  config = {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}
  config |= {"lambda_min_clipped": -np.inf, "a": [np.inf, {"b": np.nan}], "n": 10**30}
  parts = {"scheduler": saving.scheduler(config)}
  saving.save(str(tmp_path), {"_class_name": "DiffusionPipeline", "x": -np.inf}, parts)
  path = tmp_path / "scheduler" / "scheduler_config.json"
  for found in (json.loads(path.read_text()), config_fields.read_config(str(path))):
    np.testing.assert_equal(found, config)
  assert config_fields.read_config(str(tmp_path / "model_index.json"))["x"] == -np.inf
  known = {k: v for k, v in config.items() if k not in ("a", "n")}
  config_fields.write_config(str(path), known)
  assert loading.schedule(str(path.parent)).solver == "dpmpp3m"
