"""Runs in formats of others: programs of StableHLO, safetensors, EDM2's state dict."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import ClassVar

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy as original

from sdiff_jax import config as configs
from sdiff_jax.data import digits
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import pipelines, sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.exports import stablehlo
from sdiff_jax.jobs import convert, export
from sdiff_jax.pretrained import edm2
from sdiff_jax.pretrained.files import to_tensors
from sdiff_jax.training import state
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.types import UserError

NETWORKS = {
  "mlp": {"width": 16, "depth": 1},
  "dit": {"patch": 2, "width": 32, "depth": 2, "heads": 2},
  "ddpmpp": {"channels": 16, "channel_mult": (1,), "blocks": 1},
  "edm2": {"channels": 8, "channel_mult": (1, 2), "blocks": 1, "head_channels": 8},
}
# What the loader's script may not have imported.
LOAD = """
import sys, numpy as np
from load import load
images = load()
np.savez("out.npz", **{str(n): images(np.arange(n), label=np.arange(n) % 10)
                       for n in (1, 8)})
assert not {"sdiff_jax", "flax", "optax", "ml_collections"} & {*sys.modules}
"""


def settings(name: str):
  config = configs.base()
  config.model = configs.component("models", name, **NETWORKS[name])
  config.sampler.update(name="consistency", steps=2)
  config.sample.update(num=8, batch_size=8, guidance=2.0)
  return config


def random_params(network):
  """Returns parameters whose every weight has a say."""
  rng = np.random.default_rng(0)
  like = jax.eval_shape(network.init, jax.random.key(0))
  return jax.tree.map(
    lambda x: np.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), like
  )


def trained(config, workdir: pathlib.Path):
  params = random_params(experiments.build(config).network)
  workdir_lib.save_or_check_config(config, str(workdir), digits.build())
  with Checkpoints(str(workdir)) as checkpoints:
    created = state.create(params, optax.identity(), tuple(config.ema.profiles))
    checkpoints.save(1, created)
  return params


def sampled(config, params, count: int) -> np.ndarray:
  """Returns images by what the job `sample` compiles, on one device."""
  built = experiments.build(config)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  pipeline = sampling.pipeline(config, dataclasses.replace(built, mesh=mesh))
  compiled = pipelines.batch_sampler(pipeline, sampling.build_sampler(config))
  batches = pipelines.batches(
    pipeline, compiled.compile(params, count), params, count, count
  )
  return next(batches)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A work directory of an MLP, and its parameters."""
  workdir = tmp_path_factory.mktemp("export") / "run"
  config = settings("mlp")
  return config, workdir, trained(config, workdir)


def test_the_program_makes_the_images_of_sample_to_the_bit(run):
  """In a process that has only jax and numpy, for two sizes of a batch."""
  config, workdir, params = run
  (workdir / "evaluate").mkdir(exist_ok=True)
  row = {"model": "sCD", "sampler": "consistency/2", "kind": "model", "frechet": 1.25}
  (workdir / "evaluate" / "results.json").write_text(json.dumps([row]))
  config.export.update(format="stablehlo", license="mit")
  line = export.run(config, str(workdir))
  folder = workdir / "export" / "stablehlo"
  assert line == f"exported StableHLO for cpu, cuda, tpu: {folder}"
  names = {"README.md", "load.py", "params.safetensors", "program.bin"}
  assert {p.name for p in folder.iterdir()} == names
  env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": os.environ["XLA_FLAGS"]}
  subprocess.run(
    [sys.executable, "-c", LOAD], cwd=folder, env=env | flags, check=True, timeout=300
  )
  with np.load(folder / "out.npz") as arrays:
    for count, images in arrays.items():
      expected = sampled(config, params, int(count))
      assert images.dtype == np.uint8
      assert expected.std() > 10
      np.testing.assert_array_equal(images, expected)
  card = (folder / "README.md").read_text()
  assert card.startswith("---\nlicense: mit\n---\n\n# run\n")
  for text in ("consistency, 2 steps", "classes from 0 to 9", "| 1.25", "load()(range"):
    assert text in card, text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "ddpmpp", "edm2"])
def test_programs_of_other_networks(name):
  config = settings(name)
  built = experiments.build(config)
  params = random_params(built.network)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  pipeline = sampling.pipeline(config, dataclasses.replace(built, mesh=mesh))
  compiled = pipelines.batch_sampler(pipeline, sampling.build_sampler(config))
  tree = {"params": params, "constants": pipeline.constants}
  program = stablehlo.exported(compiled, tree, built.dataset.cond)
  assert program.platforms == stablehlo.PLATFORMS
  flat = to_tensors.flat(tree)
  for count in (1, 8):
    seeds, cond = pipeline.requests(np.arange(count))
    images = program.call(flat, seeds, cond)
    np.testing.assert_array_equal(images, sampled(config, params, count))


def test_safetensors_come_back(run, tmp_path):
  """By the original reader, and by the job that converts weights."""
  config, workdir, params = run
  config.export.update(format="safetensors", folder=str(tmp_path / "out"))
  export.run(config, str(workdir))
  config.export.folder = ""
  found = original.load_file(tmp_path / "out" / "params.safetensors")
  assert {k.split("/")[0] for k in found} == {"net", "logvar"}
  again = settings("mlp")
  again.convert.file = str(tmp_path / "out" / "params.safetensors")
  convert.run(again, str(tmp_path / "again"))
  _, restored = workdir_lib.trained(again, str(tmp_path / "again"))
  jax.tree.map(np.testing.assert_array_equal, restored, params)
  again.model.width = 32
  with pytest.raises(UserError, match=r"do not fit config.model: \d+ are missing"):
    convert.run(again, str(tmp_path / "other"))


def test_edm2_is_read_back(tmp_path):
  config = settings("edm2")
  config.model.update(process="edm", embedding="fourier", norm="single")
  params = trained(config, tmp_path / "run")
  config.export.format = "edm2"
  export.run(config, str(tmp_path / "run"))
  file = tmp_path / "run" / "export" / "edm2" / "edm2.safetensors"
  tensors = original.load_file(file)
  assert {"unet.enc.8x8_conv.weight", "unet.out_gain"} <= tensors.keys()
  restored = edm2.from_state_dict(tensors, params)
  jax.tree.map(np.testing.assert_array_equal, restored, params)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"export.format": "onnx"}, "no 'onnx'; known: .*edm2"),
    ({"export.format": "edm2"}, "has the network 'mlp', not 'edm2'"),
    ({"sampler.name": "paraddim"}, "those of 'ddim', which can be exported"),
    ({"sample.checkpoint": 7}, "has none of that step"),
  ],
)
def test_mistakes_are_one_line(run, fields, message):
  config = run[0].copy_and_resolve_references()
  config.update_from_flattened_dict({"export.format": "stablehlo"} | fields)
  with pytest.raises(UserError, match=message):
    export.run(config, str(run[1]))


def test_a_policy_is_refused(tmp_path):
  config = configs.base()
  config.data = configs.component("data", "trajectories")
  config.model = configs.component("models", "unet1d")
  (tmp_path / "config.json").write_text(config.to_json())
  with pytest.raises(UserError, match="only runs of images are exported"):
    export.run(config, str(tmp_path))


def test_a_network_of_another_form_than_edm2s(tmp_path):
  trained(settings("edm2"), tmp_path)
  config = settings("edm2")
  config.export.format = "edm2"
  with pytest.raises(UserError, match="model.process='trigflow'; EDM2's code has only"):
    export.run(config, str(tmp_path))


class Hub:
  """A stand-in for the Hub's interface, which keeps what is uploaded."""

  uploaded: ClassVar[dict] = {}

  def create_repo(self, repo_id: str, *, exist_ok: bool) -> str:
    assert exist_ok
    return f"https://huggingface.co/{repo_id}"

  def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
    if repo_id == "me/forbidden":
      raise PermissionError("403 Forbidden\nno write access")
    files = {p.name: p.read_bytes() for p in pathlib.Path(folder_path).iterdir()}
    self.uploaded[repo_id] = files


def test_push_uploads_all_files(run, monkeypatch):
  monkeypatch.setattr("huggingface_hub.HfApi", Hub)
  config, workdir = run[0].copy_and_resolve_references(), run[1]
  config.export.update(format="safetensors", push="hf://me/digits")
  line = export.run(config, str(workdir))
  assert line.endswith("export/safetensors, https://huggingface.co/me/digits")
  files = Hub.uploaded["me/digits"]
  assert files.keys() == {"README.md", "config.json", "params.safetensors"}
  assert len(original.load(files["params.safetensors"])) > 4
  config.export.push = "hf://me/forbidden"
  with pytest.raises(
    UserError, match="403 Forbidden no write access; the files are in"
  ):
    export.run(config, str(workdir))


def test_push_is_checked_before_any_work():
  config = configs.base()
  config.export.push = "me/digits"
  with pytest.raises(UserError, match="export.push='me/digits': must be hf://ORG/NAME"):
    configs.validate(config)
