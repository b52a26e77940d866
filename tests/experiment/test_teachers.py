"""Published models as teachers: from the folder alone, which is needed once."""

import shutil

import jax
import numpy as np
import pytest
from conftest import FIXTURES

from sdiff_jax import config as config_lib
from sdiff_jax.experiment import build, sampling, teachers
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import train
from sdiff_jax.pretrained.diffusers import saving, unet2d
from sdiff_jax.types import UserError

CHURCH, SD2 = FIXTURES / "tiny-ddpm-church", FIXTURES / "tiny-sd2"
UNET = {  # one level
  "_class_name": "UNet2DModel",
  "sample_size": 8,
  "block_out_channels": [8],
  "down_block_types": ["DownBlock2D"],
  "up_block_types": ["UpBlock2D"],
  "layers_per_block": 1,
  "norm_num_groups": 4,
  "add_attention": False,
}


def write_folder(path) -> str:
  """Writes a model with random weights, and returns its folder."""
  params = unet2d.from_config(UNET).init(jax.random.key(0))
  process = {"_class_name": "DDIMScheduler", "clip_sample": False}
  parts = {"unet": saving.network(UNET, params), "scheduler": saving.scheduler(process)}
  saving.save(str(path), {"_class_name": "DDIMPipeline"}, parts)
  return str(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("data") / "images.npz"
  pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
  np.savez(path, images=pixels)
  return str(path)


def distillation(folder, images):
  """Returns the config of sCD of a folder, from its weights."""
  config = config_lib.base()
  config.data = config_lib.component("data", "npz", path=images)
  config.teacher.folder = config.init_from = str(folder)
  config.model = config_lib.component("models", "pretrained", folder=str(folder))
  config.loss = config_lib.component("losses", "scm", velocity="teacher")
  config.train.update(steps=1, batch_size=8, log_every=1)
  config.sampler.update(name="consistency", steps=1)
  config.optim.learning_rate = 1e-12
  return config


@pytest.mark.slow
def test_a_run_needs_the_folder_once(images, tmp_path):
  """It starts from the weights of the folder, and its work directory suffices later."""
  folder = write_folder(tmp_path / "teacher")
  config, workdir = distillation(folder, images), str(tmp_path / "run")
  assert train.run(config, workdir) == f"trained 1 steps: {workdir}"
  wanted = teachers.load_init(config, build.build(config))["net"]
  stored = workdir_lib.read(workdir)
  assert workdir_lib.parent(stored) == ""
  shutil.rmtree(folder)
  experiment, params = workdir_lib.trained(stored, workdir)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params["net"], wanted
  )
  x = np.ones((2, 8, 8, 3), np.float32)
  d = sampling.denoiser(experiment, params)(x, np.ones(2, np.float32), None)
  assert np.isfinite(d).all()
  assert d.shape == x.shape
  # Another network cannot go on with it.
  config.model.folder = str(CHURCH)
  with pytest.raises(UserError, match="model.folder=.* has other networks"):
    workdir_lib.save_or_check_config(config, workdir, experiment.dataset)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"teacher.folder": "nothing"}, "teacher.folder=nothing: has no model_index.json"),
    ({"teacher.folder": str(SD2)}, "trained on latents, and the data are pixels"),
    ({"teacher.workdir": "runs/x"}, "leave config.teacher.workdir empty"),
    ({"teacher.folder": ""}, "or name a published model, config.teacher.folder"),
    ({"loss.velocity": "data"}, "use config.init_from instead"),
  ],
)
def test_what_is_no_teacher(images, fields, message):
  config = distillation(CHURCH, images)
  experiment = build.build(config)
  config.update_from_flattened_dict(fields)
  with pytest.raises(UserError, match=message) as error:
    teachers.load_teacher(config, experiment)
  assert "\n" not in str(error.value)


def test_data_of_another_unit(images):
  config = distillation(CHURCH, images)
  config.data.mean = (0.1,)
  with pytest.raises(UserError, match=r"config.model.folder=.*scaled by other means"):
    build.build(config)


@pytest.mark.parametrize(
  ("folder", "message"),
  [
    ("", "config.model.folder='': name a folder"),
    (str(SD2), "config.model.folder=.*trained on latents"),
    ("nothing", "nothing: no such folder"),
  ],
)
def test_what_is_no_network(images, folder, message):
  config = distillation(CHURCH, images)
  config.model.folder = folder
  with pytest.raises(UserError, match=message):
    build.build(config)
