"""Requests that a network cannot meet, and samples that are not finite: nothing written."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FIXTURES

from sdiff_jax import config as configs
from sdiff_jax import samplers
from sdiff_jax.data import digits
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import teachers
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import evaluate, generate, sample
from sdiff_jax.pretrained.diffusers import loading
from sdiff_jax.training import state
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.types import UserError

SD2, CHURCH = FIXTURES / "tiny-sd2", FIXTURES / "tiny-ddpm-church"
FIELDS = {
  "generate.folder": str(CHURCH),
  "sampler.name": "ddim",
  "sampler.steps": 2,
  "sample.num": 8,
  "sample.batch_size": 8,
}


def run_of(tmp_path, *, factor: float = 1.0, **fields) -> pathlib.Path:
  """Returns a work directory of a small network whose weights are multiplied."""
  config = configs.base()
  config.model = configs.component("models", "mlp", width=8, depth=1)
  config.sampler.update(name="ddim", steps=2)
  config.sample.update(num=8, batch_size=8)
  config.evaluate.update(samplers=("ddim/2",), num=8, batch_size=8)
  config.update_from_flattened_dict(fields)
  workdir = tmp_path / "run"
  workdir_lib.save_or_check_config(config, str(workdir), digits.build())
  params = experiments.build(config).network.init(jax.random.key(0))
  params = jax.tree.map(lambda x: (x + 0.1) * factor, params)
  with Checkpoints(str(workdir)) as checkpoints:
    created = state.create(params, optax.identity(), tuple(config.ema.profiles))
    checkpoints.save(1, created)
  return workdir


def files(folder: pathlib.Path) -> list[str]:
  return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return run_of(tmp_path_factory.mktemp("classes"))


@pytest.mark.parametrize(
  "job", [sample, pytest.param(evaluate, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    (
      "label",
      10,
      "config.sample.label=10: must be -1 for all classes in turn, or a clas",
    ),
    ("label", -2, "config.sample.label=-2: must be -1 .* 0 to 9"),
    ("label", 2**40, "config.sample.label=1099511627776: must be -1"),
    (
      "seed",
      2**31,
      "config.sample.seed=2147483648: must be an integer from 0 to 21474",
    ),
    ("seed", 2**31 - 4, "config.sample.seed=2147483644: must be an integer from 0 to"),
    ("seed", -1, "config.sample.seed=-1: must be an integer from 0"),
    ("seed", 2**70, "config.sample.seed=1180591620717411303424: must be"),
    ("guidance", float("nan"), "config.sample.guidance=nan: must be"),
    ("guidance", float("inf"), "config.sample.guidance=inf: must be"),
    ("guidance", 1e30, "config.sample.guidance=1e"),
    ("guidance", -1.0, "config.sample.guidance=-1.0: must be"),
  ],
)
def test_requests(trained, job, field, value, message):
  config, before = workdir_lib.read(str(trained)), files(trained)
  config.sample[field] = value
  with pytest.raises(UserError, match=message):
    job.run(config, str(trained))
  assert files(trained) == before


def test_more_images_than_memory(trained):
  config, before = workdir_lib.read(str(trained)), files(trained)
  config.sample.num = 10**13
  config.sample.seed = 0
  with pytest.raises(UserError, match=r"config.sample.(num|seed)="):
    sample.run(config, str(trained))
  config.sample.num = 2**31 - 1  # of a byte for each of 64 pixels
  with pytest.raises(UserError, match="config.sample.num=2147483647: the array of all"):
    sample.run(config, str(trained))
  assert files(trained) == before


@pytest.mark.parametrize(
  "job", [sample, pytest.param(evaluate, marks=pytest.mark.slow)]
)
def test_requests_of_a_network_without_classes(tmp_path, job):
  workdir = run_of(tmp_path, class_conditional=False)
  before = files(workdir)
  for field, value, message in (
    ("sample.label", 0, "sample.label=0: must be -1 .*, the network has no classes"),
    ("sample.guidance", 2.0, "sample.guidance=2.0: must be 1 for a network without cl"),
    ("vae", str(SD2), "config.vae=.*: only for latents, and config.data has other sa"),
  ):
    config = workdir_lib.read(str(workdir))
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
      job.run(config, str(workdir))
  assert files(workdir) == before


@pytest.mark.slow
def test_samples_that_are_not_finite(tmp_path):
  workdir = run_of(tmp_path, factor=1e30)
  config = workdir_lib.read(str(workdir))
  message = (
    "sampler 'ddim' of 2 steps, network of dtype float32: 8 of 8 samples are not"
  )
  with pytest.raises(UserError, match=message):
    sample.run(config, str(workdir))
  assert not [*workdir.rglob("*.png"), *workdir.rglob("0*.npz")]
  with pytest.raises(UserError, match=message):
    evaluate.run(config, str(workdir))
  assert not [*workdir.rglob("*.png"), *workdir.rglob("results.json")]


def test_checkpoints_that_are_not_finite(tmp_path):
  """As what is sampled, as a teacher, as a start, and when the run resumes."""
  workdir = run_of(tmp_path, factor=float("nan"))
  message = r"run, checkpoint 1: weights that are not finite: .*net.*kernel"
  config = workdir_lib.read(str(workdir))
  for job in (sample, evaluate):
    with pytest.raises(UserError, match=message):
      job.run(config, str(workdir))
  config.init_from = str(workdir)
  with pytest.raises(UserError, match=message):
    teachers.load_init(config, experiments.build(config))
  config.loss = configs.component("losses", "scm")
  config.teacher.workdir = str(workdir)
  with pytest.raises(UserError, match=message):
    teachers.load_teacher(config, experiments.build(config))


def settings(**changed):
  config = configs.base()
  config.update_from_flattened_dict(FIELDS | changed)
  return config


def change_weights(folder: pathlib.Path, part: str, name: str, value: float) -> None:
  """Sets one tensor of a folder to a number."""
  from safetensors import numpy as safetensors

  path = folder / part / "diffusion_pytorch_model.safetensors"
  tensors = safetensors.load_file(path)
  tensors[name] = np.full_like(tensors[name], value)
  safetensors.save_file(tensors, path)


def test_images_that_are_not_finite(tmp_path):
  """Weights beyond what float32 can multiply."""
  folder = shutil.copytree(CHURCH, tmp_path / "model")
  change_weights(folder, "unet", "conv_out.weight", 3e38)
  config = settings(**{"generate.folder": str(folder)})
  message = (
    "sampler 'ddim' of 2 steps, network of dtype float32: . of 8 samples are not"
  )
  with pytest.raises(UserError, match=message):
    generate.run(config, str(tmp_path / "run"))
  assert not [*tmp_path.glob("run/**/*.png")]


@pytest.mark.slow
def test_a_decoder_of_float16_that_overflows():
  """The latents are finite, the pixels are not."""
  from sdiff_jax.distributed import sharding
  from sdiff_jax.experiment import text_to_image

  model = loading.load(str(SD2), dtype="float16")
  decoder = dict(model.params["vae"])
  kernel = dict(decoder["decoder.conv_in"])
  kernel["kernel"] = np.full_like(kernel["kernel"], 3e4)
  params = model.params | {"vae": decoder | {"decoder.conv_in": kernel}}
  decode = jax.jit(
    lambda params, x: text_to_image.decode_checked(
      model, params, x, sharding.make_mesh()
    )
  )
  x = jnp.ones((8, 4, 4, 4))
  assert not decode(params, x)[1].any()
  assert decode(model.params, x)[1].all()


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    (
      {"sample.guidance": float("nan")},
      "config.sample.guidance=nan: must be from 0 to",
    ),
    ({"sample.seed": 2**31}, "config.sample.seed=2147483648: must be an integer"),
    ({"sample.num": 10**7}, "config.sample.num=10000000: must be at most 1000000"),
    ({"sample.label": 3}, "config.sample.label: only for networks trained here"),
    ({"vae": "x"}, "config.vae=x: must be empty, since .* makes pixels"),
    ({"sample.checkpoint": 3}, "config.sample.checkpoint: only for networks trained"),
    (
      {"sampler.name": "consistency"},
      "sampler.name='consistency': among models in the diffusers format, 'consis",
    ),
    (
      {"sampler.steps": 1001},
      "config.sampler.steps=1001: must be in 1 to 1000",
    ),
  ],
)
def test_requests_of_published_models(tmp_path, changed, message):
  with pytest.raises(UserError, match=message):
    generate.run(settings(**changed), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["images", "images.json", "images/00003.png"])
def test_paths_in_the_way(tmp_path, name):
  path = tmp_path / "run" / name
  if name == "images":
    path.parent.mkdir()
    path.write_text("x")
  else:
    path.mkdir(parents=True)
  before = files(tmp_path)
  with pytest.raises(UserError, match=f"{name} is no .*: move it, or use another"):
    generate.run(settings(), str(tmp_path / "run"))
  assert files(tmp_path) == before


def test_python_door():
  sampler = samplers.build("ddim", sigma_d=0.5, steps=2)

  def denoiser(x, time, cond):
    return 0 * x

  for seeds, message in (
    ([2**31], "seeds=2147483648: must be from 0 to"),
    ([-1], "seeds=-1: must be from 0 to"),
    ([0.5], "seeds: must be a list of integers, not float64"),
  ):
    with pytest.raises(ValueError, match=message):
      samplers.sample(sampler, denoiser, seeds, (2,))
  message = "denoiser: 2 of 2 samples of the sampler 'ddim' with 2 steps are not finite"
  with pytest.raises(ValueError, match=message):
    samplers.sample(sampler, lambda x, t, c: x / 0 * 0, [0, 1], (2,))
  traced = jax.jit(lambda seeds: samplers.sample(sampler, denoiser, seeds, (2,)).x)
  assert traced(jnp.arange(2)).shape == (2, 2)
