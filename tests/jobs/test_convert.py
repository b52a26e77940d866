"""Work directories of other people's weights."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_xla import xla_flags

from sdiff_jax import config as configs
from sdiff_jax.data import trajectories
from sdiff_jax.diffusion import noise_schedules, trigflow
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import sampling, teachers
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import convert
from sdiff_jax.pretrained import diffusion_policy
from sdiff_jax.training.trainer import initialize_from
from sdiff_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[2]
LABELS = np.array([1, 3, -1])  # rows 0, 1 and 3 of the fixture
CONFIG = """
from sdiff_jax import config

def get_config():
  c = config.base()
  c.data = config.component("data", "npz", path={data!r})
  c.model = config.component(
    "models", "ddpmpp", process="edm", norm="single", channels=16,
    channel_mult=(1, 2), emb_mult=2, blocks=1, attn_resolutions=(8,), augment=9,
  )
  return c
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
  """A folder with a config, its data, and the weights of a small network of EDM's."""
  folder = tmp_path_factory.mktemp("files")
  with np.load(ROOT / "tests/fixtures/edm_ddpmpp.npz") as arrays:
    np.savez(folder / "edm.npz", **{k[2:]: arrays[k] for k in arrays if k[:2] == "w/"})
  images = np.zeros((4, 16, 16, 3), np.uint8)
  np.savez(folder / "data.npz", images=images, labels=np.arange(4))
  text = CONFIG.format(data=str(folder / "data.npz"))
  (folder / "config.py").write_text(text)
  return folder


def config_of(files: pathlib.Path, file: str = "edm.npz"):
  names = {}
  exec((files / "config.py").read_text(), names)
  config = names["get_config"]()
  config.convert.file = str(files / file)
  return config


@pytest.fixture(scope="module")
def converted(files, tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("converted") / "run"
  line = convert.run(config_of(files), str(workdir))
  assert line == f"converted 177731 parameters of {files / 'edm.npz'}: {workdir}"
  return workdir


@pytest.mark.slow
def test_the_denoiser_is_edms(converted, fixture):
  config = workdir_lib.read(str(converted))
  experiment, params = workdir_lib.trained(config, str(converted))
  arrays, rows = fixture("edm_ddpmpp"), np.array([0, 1, 3])
  x = jnp.moveaxis(jnp.asarray(arrays["x"][rows]), 1, -1)
  t = jnp.arctan(jnp.asarray(arrays["sigma"][rows]) / config.sigma_d)
  given = jnp.asarray(arrays["augment_labels"][rows])
  cond = {"label": jnp.asarray(LABELS), "augment": given}
  quickly = {"xla_backend_optimization_level": 0}
  denoiser = jax.jit(sampling.denoiser(experiment, params), compiler_options=quickly)
  D = denoiser(jnp.cos(trigflow.expand(t, x)) * x, t, cond)
  wanted = np.moveaxis(arrays["ref64/D"][rows], 1, -1)
  np.testing.assert_allclose(D, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_it_is_a_teacher(converted, files):
  config = config_of(files)
  config.init_from = config.teacher.workdir = str(converted)
  config.loss = configs.component("losses", "scm")
  student = experiments.build(config)
  network, frozen = teachers.load_teacher(config, student)
  assert network is not None
  shapes = jax.eval_shape(student.network.init, jax.random.key(0))
  fresh = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  params = initialize_from(frozen, fresh)
  jax.tree.map(np.testing.assert_array_equal, params["net"], frozen["net"])
  assert jnp.std(frozen["net"]["dec_16x16_aux_conv"]["kernel"]) > 0


def test_settings_of_a_file(files, capsys):
  """Those that it tells are taken from it; others are printed, with their values."""
  config = config_of(files)
  config.model = configs.component("models", "edm2", process="edm", res_balance=0.4)
  told = {"sigma_data": 0.5, "unet.label_balance": 0.2, "unet.x.res_balance": 0.4}
  found = convert._with_settings(config, told)
  assert (found.model.label_balance, found.model.res_balance) == (0.2, 0.4)
  assert config.model.label_balance == 0.5
  said = capsys.readouterr().err
  assert (
    "assumed concat_balance=0.5, attn_balance=0.3, resample_filter=(1, 1), " in said
  )
  assert "clip=256.0, head_channels=64, which the file does not tell" in said
  with pytest.raises(
    UserError, match=r"model.res_balance=0.4: must be 0.3, which .*edm"
  ):
    convert._with_settings(config, told | {"unet.x.res_balance": 0.3})
  with pytest.raises(UserError, match="config.sigma_d=0.5: must be sigma_data=1.0 of"):
    convert._with_settings(config, told | {"sigma_data": 1.0})


def test_weights_that_are_not_finite(files, tmp_path):
  with np.load(files / "edm.npz") as arrays:
    tensors = dict(arrays)
  name = "model.enc.16x16_conv.weight"
  tensors[name] = np.full_like(tensors[name], np.nan)
  np.savez(tmp_path / "nan.npz", **tensors)
  config = config_of(files)
  config.convert.file = str(tmp_path / "nan.npz")
  with pytest.raises(UserError, match=f"nan.npz: tensors that are not finite: {name}"):
    convert.run(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_by_the_command_line(files, tmp_path):
  def call(*args):
    return subprocess.run(
      [sys.executable, "-m", "sdiff_jax.main", f"--workdir={tmp_path / 'run'}", *args],
      cwd=ROOT,
      env=os.environ | {"XLA_FLAGS": xla_flags(1)},
      capture_output=True,
      text=True,
      check=False,
    )

  config = f"--config={files / 'config.py'}"
  done = call(config, "--job=convert", f"--config.convert.file={files / 'edm.npz'}")
  assert done.stdout.startswith("converted 177731 parameters"), done.stderr
  small = ("--config.sample.num=2", "--config.sample.batch_size=2")
  done = call(config, "--job=sample", "--config.sampler.steps=2", *small)
  assert done.stdout.startswith("made 2 images"), done.stderr
  with np.load(tmp_path / "run" / "samples.npz") as arrays:
    assert arrays["arr_0"].shape == (2, 16, 16, 3)
    assert arrays["arr_0"].std() > 0
  done = call("--job=convert")
  assert done.returncode == 2
  assert done.stderr.startswith("error: --config is missing")


def test_mistakes(converted, files, tmp_path):
  def refused(message, config, workdir=tmp_path / "none"):
    with pytest.raises(UserError, match=message):
      convert.run(config, str(workdir))
    assert not (tmp_path / "none").exists()

  refused("has checkpoints already", config_of(files), converted)
  refused("no such file", config_of(files, "gone.pt"))
  refused(
    r"data.npz: the tensors do not fit the network: missing: model.*",
    config_of(files, "data.npz"),
  )
  config = config_of(files)
  config.convert.file = ""
  refused(r"config.convert.file is empty", config)
  config = config_of(files)
  config.model = configs.component("models", "mlp")
  refused(
    "config.model.name='mlp': pretrained weights can be read for ddpmpp, edm2, unet1d",
    config,
  )


@pytest.mark.slow
def test_a_policy_brings_its_own_sizes_and_scales(tmp_path, fixture):
  """No data are needed, and its denoiser is that of the file."""
  arrays = fixture("dp_unet1d")
  file = {f"model.{k[2:]}": v for k, v in arrays.items() if k.startswith("w/")}
  for name, n in (("obs", 20), ("action", 2)):
    head = f"normalizer.params_dict.{name}"
    file |= {f"{head}.scale": np.full(n, 0.5), f"{head}.offset": np.arange(float(n))}
  np.savez(tmp_path / "policy.npz", **file)
  config = configs.base()
  config.data = configs.component("data", "trajectories", path="none")
  config.convert.file = str(tmp_path / "policy.npz")
  workdir = str(tmp_path / "run")
  convert.run(config, workdir)
  experiment, params = workdir_lib.trained(config, workdir)
  fitted = experiment.dataset.normalizer
  np.testing.assert_array_equal(fitted.action.centre, [0, -2])
  assert (fitted.steps, fitted.shape, fitted.std) == (2, (16, 2), 1.0)
  assert workdir_lib.read(workdir).model.channels == (16, 32, 48)
  abar, n = noise_schedules.alphas_cumprod("cosine", 100), 31
  t = jnp.full(4, np.arctan((1 / abar[n] - 1) ** 0.5), jnp.float32)
  cond = {"observation": jnp.asarray(arrays["global_cond"])}
  x = jnp.asarray(arrays["sample"])
  F = jax.jit(experiment.network.apply)(params, x, t, cond)
  d = trigflow.denoise(x, F, t, 1.0)
  predict = diffusion_policy.predictor(
    shape=(16, 2),
    cond=trajectories.observation_cond(40),
    channels=(16, 32, 48),
    embed=32,
  )
  eps = jax.jit(predict.apply)(params["net"], x, jnp.full(4, float(n)), cond)
  wanted = (x - (1 - abar[n]) ** 0.5 * eps) / abar[n] ** 0.5
  np.testing.assert_allclose(d, wanted, atol=2e-4)
