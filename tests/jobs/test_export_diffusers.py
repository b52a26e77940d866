"""Exported folders: diffusers makes the images of our sampler of them."""

import json
import pathlib
import re

import jax
import numpy as np
import optax
import pytest
from conftest import FIXTURES
from exported import SIDES, images, student
from PIL import Image

from sdiff_jax import config as configs
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.exports import Run
from sdiff_jax.experiment.exports import diffusers as diffusers_format
from sdiff_jax.experiment.exports import lora as lora_format
from sdiff_jax.jobs import export, generate, sample
from sdiff_jax.models.layers import lora
from sdiff_jax.pretrained.diffusers import (
  consistency,
  loading,
  lora_file,
  saving,
  scheduler,
  unet2d,
  weights,
)
from sdiff_jax.training import state
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.types import UserError

STEPS = diffusers_format.STEPS
CASES = [pytest.param(name, STEPS, marks=pytest.mark.slow) for name in SIDES]
UNET = {  # of one level
  "_class_name": "UNet2DModel",
  "sample_size": 8,
  "block_out_channels": [8],
  "down_block_types": ["DownBlock2D"],
  "up_block_types": ["UpBlock2D"],
  "layers_per_block": 1,
  "norm_num_groups": 4,
  "add_attention": False,
}


@pytest.mark.parametrize(("name", "all_steps"), [("sd2", (2,)), *CASES])
def test_diffusers_makes_the_same_images(
  name, all_steps, fixture, monkeypatch, tmp_path
):
  """In 1, 2 and 4 steps with the same noise, to 2 of 255 levels.

  The folder that diffusers sampled has the scheduler and the pipeline of this one.
  """
  arrays, made = fixture("diffusers_export"), student(name)
  diffusers_format.write(made.run, str(tmp_path))
  written = (tmp_path / "scheduler" / "scheduler_config.json").read_text()
  assert json.loads(written) == json.loads(str(arrays[f"{name}/scheduler"]))
  index = json.loads((tmp_path / "model_index.json").read_text())
  assert index["_class_name"] == arrays[f"{name}/pipeline"]
  # What is read of it again is sampled likewise.
  process = loading.schedule(str(tmp_path / "scheduler"))
  assert process.solver == "consistency"
  for steps in all_steps:
    at = f"{name}/{steps}"
    noise, expected = (
      arrays[f"{at}/{k}"].astype(np.float32) for k in ("noise", "sample")
    )
    x, pixels = images(made, steps, noise, tmp_path, monkeypatch)
    assert np.abs(x[0] - expected).max() < 1e-4 * np.abs(expected).max(), at
    image = arrays[f"{at}/image"].astype(int)
    assert np.abs(pixels[0].astype(int) - image).max() <= 2, at
    assert image.std() > 10


def test_timesteps_are_those_of_lcm():
  """Evenly spaced indices of all timesteps, from the last one on."""
  schedule = scheduler.from_config({"_class_name": "DDIMScheduler"})
  assert consistency.timesteps(schedule, 1).tolist() == [999]
  assert consistency.timesteps(schedule, 3).tolist() == [999, 666, 333]
  with pytest.raises(ValueError, match="steps=1001: must be in 1 to 1000"):
    consistency.timesteps(schedule, 1001)


def test_steps_of_a_flow_with_fresh_noise():
  """x' = (1 - sigma') d + sigma' z at the levels of the shift, as the folder says it."""
  source = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
  process = scheduler.from_config(consistency.scheduler_config(source))
  table = scheduler.tableau(process._replace(spacing="trailing"), 2)
  np.testing.assert_allclose(table.time, [1, 0.75])
  np.testing.assert_array_equal(table.x_coef, 0)
  np.testing.assert_allclose(table.denoised_coef[:, 0], [0.25, 1])
  np.testing.assert_allclose(table.noise_coef, [0.75, 0], atol=1e-12)
  assert consistency.scheduler_config(consistency.SCM) == consistency.SCM


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("sd3", {"guidance": True}, "the guidance scale is an input of the run's network"),
    ("sd2", {"time_scale": 0.5}, "model.time_scale=0.5, .*times that need 1;"),
    ("sana", {"guidance": True}, "model.time_scale=1, .*times that need 0.001;"),
  ],
)
def test_networks_that_a_pipeline_does_not_have(name, fields, message, tmp_path):
  config = configs.base()
  folder = str(FIXTURES / f"tiny-{name}")
  config.model = configs.component("models", "pretrained", folder=folder, **fields)
  config.loss = configs.component("losses", "scm")
  with pytest.raises(UserError, match=message):
    diffusers_format.write(Run(config, config, None, None), str(tmp_path))


def test_a_guided_network_is_written_with_its_layer(tmp_path):
  """As in latent consistency models, whose pipeline then gives the scale."""
  config = configs.base()
  folder = str(FIXTURES / "tiny-sd2")
  options = {"guidance": True, "qk_norm": False}
  config.model = configs.component("models", "pretrained", folder=folder, **options)
  run = Run(config, config, None, None)
  published = loading.configs(folder)
  pipeline = "StableDiffusionPipeline"
  written = diffusers_format._network_config(run, published, "unet", pipeline)
  assert written == published["unet"] | {"time_cond_proj_dim": 256}
  config.model.update(
    folder=str(FIXTURES / "tiny-sana"), guidance=False, time_scale=0.5
  )
  published = loading.configs(config.model.folder)
  written = diffusers_format._network_config(
    run, published, "transformer", "SanaPipeline"
  )
  assert written["timestep_scale"] == 0.5


def test_the_scalings_of_lcm_are_those_of_a_consistency_model():
  """c_skip and 1 - c_out of the timesteps of up to four steps are below 1e-7."""
  config = consistency.scheduler_config({"_class_name": "DDIMScheduler"})
  schedule = scheduler.from_config({"_class_name": "DDIMScheduler"})
  for steps in STEPS:
    scaled = config["timestep_scaling"] * consistency.timesteps(schedule, steps)
    skip = 0.25 / (scaled**2 + 0.25)
    out = scaled / (scaled**2 + 0.25) ** 0.5
    assert max(*skip, *(1 - out)) < 1e-7


def published(path: pathlib.Path) -> str:
  """Writes a model with random weights and a license; returns its folder."""
  params = unet2d.from_config(UNET).init(jax.random.key(0))
  process = {"_class_name": "DDIMScheduler", "clip_sample": False}
  parts = {"unet": saving.network(UNET, params), "scheduler": saving.scheduler(process)}
  saving.save(str(path), {"_class_name": "DDIMPipeline"}, parts)
  (path / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# church\n")
  return str(path)


def trained(folder: str, tmp_path: pathlib.Path, loss: str = "scm", **adapters):
  """Saves a run of the network of a folder at step 1; returns its config."""
  pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
  np.savez(tmp_path / "images.npz", images=pixels)
  config = configs.base()
  path = str(tmp_path / "images.npz")
  config.data = configs.component("data", "npz", path=path)
  config.model = configs.component("models", "pretrained", folder=folder)
  config.loss = configs.component("losses", loss)
  config.lora.update(**adapters)
  config.sampler.update(name="consistency", steps=2)
  built = experiments.build(config)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: np.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
    jax.eval_shape(built.network.init, jax.random.key(1)),
  )
  workdir_lib.save_or_check_config(config, str(tmp_path / "run"), built.dataset)
  with Checkpoints(str(tmp_path / "run")) as checkpoints:
    created = state.create(params, optax.identity(), tuple(config.ema.profiles))
    checkpoints.save(1, created)
  return config


def test_a_diffusion_model_keeps_its_scheduler(tmp_path):
  folder = published(tmp_path / "church")
  config = trained(folder, tmp_path, "diffusion")
  config.export.format = "diffusers"
  export.run(config, str(tmp_path / "run"))
  out = tmp_path / "run" / "export" / "diffusers"
  for name in ("model_index.json", "scheduler/scheduler_config.json"):
    kept = (tmp_path / "church" / name).read_text()
    assert json.loads((out / name).read_text()) == json.loads(kept)
  card = (out / "README.md").read_text()
  assert "pipe(batch_size=4)" in card
  assert "consistency" not in card.split("```")[2]


def test_the_job_writes_a_folder_and_its_card(tmp_path):
  folder = published(tmp_path / "church")
  config = trained(folder, tmp_path)
  config.export.format = "diffusers"
  out = tmp_path / "run" / "export" / "diffusers"
  line = export.run(config, str(tmp_path / "run"))
  assert line == f"exported a folder of diffusers: {out}"
  _, params = workdir_lib.trained(config, str(tmp_path / "run"))
  net = loading.network(str(out / "unet"))
  restored = weights.parameters(str(out / "unet"), net)
  jax.tree.map(np.testing.assert_array_equal, restored, params["net"])
  index = json.loads((out / "model_index.json").read_text())
  assert index["_class_name"] == "DDPMPipeline"  # the other one replaces schedulers
  assert index["scheduler"] == ["diffusers", "LCMScheduler"]
  card = (out / "README.md").read_text()
  assert card.startswith("---\nlibrary_name: diffusers\nlicense: mit\n---\n")
  for text in ("pipe(batch_size=4, num_inference_steps=2)", "sampler.steps=4"):
    assert text in card, text


def test_generate_samples_the_folder_as_sample_samples_the_run(tmp_path):
  """By the timesteps of the card, to 2 of 255 levels."""
  config = trained(published(tmp_path / "church"), tmp_path)
  config.export.format = "diffusers"
  workdir = tmp_path / "run"
  export.run(config, str(workdir))
  out = workdir / "export" / "diffusers"
  card = (out / "README.md").read_text()
  grid = re.search(r'steps=2 --config\.sampler\.timesteps="(.*)"', card)[1]
  config.sampler.timesteps = tuple(map(float, grid.strip("()").split(",")))
  config.sample.update(num=8, batch_size=8)
  sample.run(config, str(workdir))
  by = configs.base()
  by.generate.folder = str(out)
  by.sampler.update(name="consistency", steps=2)
  by.sample.update(num=8, batch_size=8)
  generate.run(by, str(tmp_path / "made"))
  paths = sorted((tmp_path / "made" / "images").glob("*.png"))
  found = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)
  with np.load(workdir / "samples.npz") as made:
    wanted = made["arr_0"].astype(int)
  assert found.shape == wanted.shape
  assert np.abs(found - wanted).max() <= 2
  assert wanted.std() > 10


@pytest.mark.slow
def test_adapters_are_written_apart_and_merged(tmp_path):
  """Read back, they add to the published weights what the merged folder has."""
  folder = published(tmp_path / "church")
  config = trained(folder, tmp_path, rank=2, alpha=3.0, targets="conv1")
  _, params = workdir_lib.trained(config, str(tmp_path / "run"))
  out = {}
  for name in ("lora", "diffusers"):
    config.export.update(format=name, folder=str(tmp_path / name))
    out[name] = export.run(config, str(tmp_path / "run"))
  assert out["lora"] == f"exported adapters of diffusers: {tmp_path / 'lora'}"
  net = loading.network(str(tmp_path / "diffusers" / "unet"))
  merged = weights.parameters(str(tmp_path / "diffusers" / "unet"), net)
  file = str(tmp_path / "lora" / lora_file.FILE)
  adapters = lora_file.load(file, merged, part="unet")
  apart = lora.merge(params["net"], adapters, 1.0)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), apart, merged
  )
  change = jax.tree.map(lambda a, b: np.abs(a - b).max(), merged, params["net"])
  assert (
    sum(x > 0 for x in jax.tree.leaves(change)) == len(jax.tree.leaves(adapters)) / 2
  )
  assert "load_lora_weights" in (tmp_path / "lora" / "README.md").read_text()


def test_a_run_without_adapters_has_none_to_write(tmp_path):
  config = configs.base()
  with pytest.raises(UserError, match=r"needs a run with lora.rank above 0"):
    lora_format.write(Run(config, config, None, None), str(tmp_path))


def test_networks_that_diffusers_does_not_have(tmp_path):
  config = configs.base()
  run = Run(config, config, None, None)
  with pytest.raises(UserError, match="the network 'mlp', which diffusers does not"):
    diffusers_format.write(run, str(tmp_path))
  config.model = configs.component("models", "pretrained", folder="church")
  config.loss = configs.component("losses", "flow_map")
  with pytest.raises(UserError, match="a flow map, whose end time the network"):
    diffusers_format.write(run, str(tmp_path))
  config.loss = configs.component("losses", "scm")
  with pytest.raises(UserError, match="church: no such folder"):
    diffusers_format.write(run, str(tmp_path))
