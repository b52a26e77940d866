"""Every field of every config of a folder set to something else: success or one line."""

import copy
import json
import os
import shutil
import time

import numpy as np
import pytest
from conftest import FIXTURES

from sdiff_jax.metrics.features import _clip_weights, clip
from sdiff_jax.pretrained import lerobot
from sdiff_jax.pretrained.diffusers import loading, scheduler
from sdiff_jax.pretrained.diffusers import tokenizer as tokenizer_lib
from sdiff_jax.types import UserError

SD2, CHURCH = FIXTURES / "tiny-sd2", FIXTURES / "tiny-ddpm-church"
VALUES = (None, True, -1, 0, 1, 7, 10**9, 2**70, 0.5, float("nan"), float("inf"))
VALUES += ("text", "", [], [1], ["a"], [[[[1]]]], {}, {"a": 1})
UNET, VAE, TEXT = (f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))
SCHEDULER, TOKENIZER = (
  "scheduler/scheduler_config.json",
  "tokenizer/tokenizer_config.json",
)
FILES = [(SD2, k) for k in (UNET, VAE, TEXT, SCHEDULER, TOKENIZER, "model_index.json")]
FILES += [(CHURCH, UNET), (CHURCH, SCHEDULER)]


LEROBOT = {
  "type": "diffusion",
  "n_obs_steps": 2,
  "horizon": 16,
  "n_action_steps": 8,
  "input_features": {"observation.state": {"type": "STATE", "shape": [4]}},
  "output_features": {"action": {"type": "ACTION", "shape": [2]}},
  "normalization_mapping": {"STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
  "down_dims": [16, 32],
  "kernel_size": 5,
  "n_groups": 8,
  "diffusion_step_embed_dim": 32,
  "use_film_scale_modulation": True,
  "noise_scheduler_type": "DDIM",
  "beta_start": 0.0001,
  "beta_schedule": "squaredcos_cap_v2",
  "prediction_type": "epsilon",
  "clip_sample": True,
  "num_inference_steps": 10,
}
TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = {
  "transformers": {
    "projection_dim": 8,
    "text_config": TOWER | {"vocab_size": 64, "eos_token_id": 2, "hidden_act": "gelu"},
    "vision_config": TOWER | {"image_size": 8, "patch_size": 4, "layer_norm_eps": 1e-5},
  },
  "open_clip": {
    "embed_dim": 8,
    "quick_gelu": True,
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2},
    "vision_cfg": {
      "image_size": 8,
      "layers": 1,
      "width": 16,
      "head_width": 8,
      "patch_size": 4,
    },
  },
}


@pytest.fixture
def without_weights(tmp_path):
  """Returns a copy of a folder without its weights."""
  ignore = shutil.ignore_patterns("*.safetensors")
  return lambda folder: shutil.copytree(folder, tmp_path / folder.name, ignore=ignore)


def mutants(config: dict):
  """Yields what was changed, and the changed config."""
  for field, value in config.items():
    for other in VALUES:
      yield f"{field}={other!r}", config | {field: other}
    yield f"no {field}", {k: v for k, v in config.items() if k != field}
    for k in range(len(value) if isinstance(value, list) else 0):
      for other in VALUES:
        changed = copy.deepcopy(config)
        changed[field][k] = other
        yield f"{field}[{k}]={other!r}", changed


def read(folder, file: str) -> None:
  """Reads what a file of a folder says, without the weights."""
  part = folder / file.split("/")[0]
  if file == "model_index.json":
    loading.configs(str(folder))
  elif file == TOKENIZER:
    tokenizer_lib.load(str(part)).encode(["a cat"])
  elif file == SCHEDULER:
    schedule = loading.schedule(str(part))
    try:
      tableau = scheduler.tableau(schedule, 5)
      assert all(np.isfinite(column).all() for column in tableau if column is not None)
    except ValueError as error:
      assert str(error).startswith("steps=5: must be in 1 to 1")  # noqa: PT017
  else:
    loading.network(str(part))


@pytest.mark.parametrize(("source", "file"), FILES)
def test_fields(without_weights, source, file):
  folder = without_weights(source)
  path = folder / file
  for changed, config in mutants(json.loads(path.read_text())):
    path.write_text(json.dumps(config))
    begin = time.process_time()
    try:
      read(folder, file)
    except UserError as error:
      message = str(error).replace(str(folder), "")
      assert file in message or path.parent.name in message, changed
      assert len(message) < 400, changed
      assert "\n" not in message, changed
    assert time.process_time() - begin < 5, changed


@pytest.mark.parametrize(
  ("file", "fields", "message"),
  [
    (
      "model_index.json",
      {"scheduler": None},
      "names no unet and no transformer, or no sch",
    ),
    (
      "model_index.json",
      {"scheduler": [None, None]},
      "scheduler=.*: must name a class",
    ),
    (
      "model_index.json",
      {"unet": ["diffusers", {}]},
      "unet=.*: must be a list of 2 to 2",
    ),
    (
      "model_index.json",
      {"tokenizer": ["a", "T5"]},
      "tokenizer: T5 is none of CLIPTok",
    ),
    (UNET, {"sample_size": 7}, r"sample_size=\[7, 7\]: must be multiples of 2"),
    (
      UNET,
      {"sample_size": 10**6},
      "sample_size=1000000: must be an integer from 1 to 1",
    ),
    (
      UNET,
      {"layers_per_block": 10**6},
      "layers_per_block=1000000: must be an integer fr",
    ),
    (UNET, {"transformer_layers_per_block": 10**6}, "must be an integer from 1 to 64"),
    (
      UNET,
      {"transformer_layers_per_block": 64, "layers_per_block": 64},
      r"layers_per_block=\[64, 64\]: .*must make at most 1000 blocks, not 16770",
    ),
    (
      UNET,
      {"block_out_channels": [-16, 32]},
      "block_out_channels=.*each an integer fr",
    ),
    (UNET, {"block_out_channels": [16] * 1000}, "must be a list of 1 to 16"),
    (UNET, {"attention_head_dim": None}, "attention_head_dim=None: must be an integer"),
    (UNET, {"out_channels": 3}, "out_channels=3: must be in_channels=4"),
    (
      UNET,
      {"architectures": 3, "_class_name": None},
      "architectures=3: must be a list",
    ),
    (UNET, {"down_block_types": ["x" * 10**5] * 2}, r"down_block_types=\['xxx"),
    (VAE, {"scaling_factor": None}, "scaling_factor=None: must be a number above 0"),
    (VAE, {"scaling_factor": "1"}, "scaling_factor='1': must be a number above 0"),
    (VAE, {"layers_per_block": 10**6}, "must be an integer from 1 to 64"),
    (
      TEXT,
      {"vocab_size": 2**40},
      "vocab_size=1099511627776: must be an integer from 1",
    ),
    (TEXT, {"eos_token_id": 64}, "eos_token_id=64: must be below vocab_size=64"),
    (SCHEDULER, {"beta_start": float("nan")}, "beta_start=nan: must be a number above"),
    (SCHEDULER, {"beta_start": 0.5}, "beta_start=0.5: must be at most beta_end=0.012"),
    (
      SCHEDULER,
      {"trained_betas": [0.1, float("nan")]},
      r"trained_betas=\[0.1, nan\]: m",
    ),
    (
      SCHEDULER,
      {"trained_betas": [0.1]},
      "must be as many as num_train_timesteps=1000",
    ),
    (SCHEDULER, {"trained_betas": []}, r"trained_betas=\[\]: must be a list of 1 to"),
    (SCHEDULER, {"steps_offset": -1}, "steps_offset=-1: must be"),
    (SCHEDULER, {"steps_offset": 1000}, "steps_offset=1000: must be below num_train_t"),
    (SCHEDULER, {"clip_sample_range": "1"}, "clip_sample_range='1': must be a number"),
    (SCHEDULER, {"num_train_timesteps": 10**12}, "must be an integer from 1 to 100000"),
    (SCHEDULER, {"_class_name": ["a"]}, r"_class_name=\['a'\]: must be one of DDIM"),
    (
      TOKENIZER,
      {"model_max_length": 0},
      "model_max_length=0: must be an integer of at",
    ),
    (
      TOKENIZER,
      {"model_max_length": float("nan")},
      "model_max_length=nan: must be an in",
    ),
    (TOKENIZER, {"pad_token": "unknown"}, "pad_token='unknown': must be in the vocab"),
    (TOKENIZER, {"pad_token": {"content": 1}}, "pad_token=.*: must be a text, or have"),
  ],
)
def test_values(without_weights, file, fields, message):
  """Each names the file, the field, the value and what is allowed."""
  folder = without_weights(SD2)
  path = folder / file
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))
  with pytest.raises(UserError, match=message):
    read(folder, file)


def test_the_scheduler_of_the_index(without_weights, capsys):
  """The file's class is used, as before, but not in silence."""
  part = without_weights(SD2) / "scheduler"
  assert loading.schedule(str(part), "DDIMScheduler").solver == "ddim"
  assert not capsys.readouterr().err
  assert loading.schedule(str(part), "EulerDiscreteScheduler").solver == "ddim"
  assert "uses its _class_name=DDIMScheduler; model_index" in capsys.readouterr().err


def test_relations_of_parts(without_weights):
  folder = without_weights(SD2)
  path = folder / VAE
  path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_channels": 8}))
  with pytest.raises(
    UserError, match="unet has in_channels=4, the vae latent_channels=8"
  ):
    loading.load(str(folder))


def test_ids_of_another_vocabulary(without_weights):
  """Few tokens, but an id beyond the embeddings of the text encoder."""
  folder = shutil.copytree(SD2, without_weights(CHURCH).parent / "copy")
  path = folder / "tokenizer" / "tokenizer.json"
  content = json.loads(path.read_text())
  content["model"]["vocab"]["extra"] = 5000
  path.write_text(json.dumps(content))
  with pytest.raises(UserError, match="has 5001 tokens, the text encoder 64"):
    loading.load(str(folder))


DAMAGE = {
  "empty": b"",
  "cut": b'{"unet": ["diff',
  "not utf-8": b'{"a": "\xff\xfe"}',
  "utf-16": '{"a": 1}'.encode("utf-16"),
  "a list": b"[]",
  "a number": b"3",
  "deep list": b"[" * 200_000,
  "deep object": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
  "many digits": b'{"sample_size": ' + b"9" * 100_000 + b"}",
  "large": b" " * (17 << 20) + b"{}",
}


@pytest.mark.parametrize(("source", "file"), FILES[:6])
def test_files_that_are_something_else(without_weights, source, file):
  folder = without_weights(source)
  path = folder / file
  for name, content in DAMAGE.items():
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name) as caught:
      read(folder, file)
    assert len(str(caught.value)) < 480, name
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(UserError, match="is a named pipe, not a regular file"):
    read(folder, file)


def test_numbers_that_json_does_not_have(without_weights):
  """diffusers writes -Infinity and transformers 10^30 (as a float's integer)."""
  folder = without_weights(SD2)
  path = folder / SCHEDULER
  config = {"_class_name": "DPMSolverMultistepScheduler"}
  path.write_text(json.dumps(config | {"lambda_min_clipped": float("-inf")}))
  assert loading.schedule(str(path.parent)).solver == "dpmpp2m"
  path = folder / TOKENIZER
  path.write_text(json.dumps({"model_max_length": int(1e30)}))
  assert tokenizer_lib.load(str(path.parent)).length == 77


def nested(config: dict, path: tuple = ()):
  """Yields all positions in a config, as tuples of keys."""
  for key, value in config.items():
    yield (*path, key)
    if isinstance(value, dict):
      yield from nested(value, (*path, key))


def changed_at(config: dict, path: tuple, value) -> dict:
  copied = copy.deepcopy(config)
  inner = copied
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = value
  return copied


VALUES_OF_SHAPES = (*VALUES, [10**9], [-1], [2, 2], [None], [10**30])


def test_lerobot(tmp_path):
  """A policy's config: everything is checked before weights are looked for."""
  path = tmp_path / "config.json"
  for at in nested(LEROBOT):
    for value in VALUES_OF_SHAPES:
      path.write_text(json.dumps(changed_at(LEROBOT, at, value)))
      with pytest.raises(UserError) as caught:
        lerobot.load(str(tmp_path))
      message = str(caught.value)
      assert message.startswith(str(path)) or "has no model.safetensors" in message, at
      assert len(message) <= 480, at


@pytest.mark.parametrize("config", ["transformers", "open_clip"])
def test_clip(config):
  read = {
    "transformers": clip.from_config,
    "open_clip": lambda c: clip.from_config(_clip_weights.config(c)),
  }[config]
  original = CLIP[config]
  read(original)
  for at in nested(original):
    for value in VALUES:
      try:
        read(changed_at(original, at, value))
      except ValueError as error:
        assert len(str(error)) < 400, (at, value)  # noqa: PT017
