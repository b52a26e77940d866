"""Images by published models: as by their own pipeline, in parallel, gone on with."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES
from PIL import Image

from sdiff_jax import config as configs
from sdiff_jax import main, samplers
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import pipelines, published_model, text_to_image
from sdiff_jax.jobs import generate
from sdiff_jax.pretrained.diffusers import loading
from sdiff_jax.samplers import autotune, sequential
from sdiff_jax.samplers import sampler as sampler_lib
from sdiff_jax.types import UserError

SD2, CHURCH = FIXTURES / "tiny-sd2", FIXTURES / "tiny-ddpm-church"
ROOT = pathlib.Path(__file__).parents[2]
FIELDS = {
  "generate.folder": str(SD2),
  "generate.prompts": "a cat;a dog",
  "generate.timestep_spacing": "trailing",
  "sampler.name": "ddim",
  "sampler.steps": 3,
  "sample.num": 5,
  "sample.batch_size": 2,
  "sample.guidance": 7.5,
  "mesh.data": 2,
  "mesh.window": 4,
}


def settings(fields=FIELDS, **changed):
  config = configs.base()
  changed = {k.replace("__", "."): v for k, v in changed.items()}
  config.update_from_flattened_dict(fields | changed)
  return config


def images(workdir: pathlib.Path) -> np.ndarray:
  paths = sorted((workdir / "images").glob("*.png"))
  return np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])


@functools.cache
def sd2() -> loading.Model:
  return loading.load(str(SD2))


def planned(**fields):
  """Returns the model with its schedule as it is solved, and the sampler."""
  schedule, sampler = published_model.build_sampler(sd2().schedule, **fields)
  return sd2()._replace(schedule=schedule), sampler


def test_a_prompt_becomes_the_latents_and_the_image_of_the_original_pipeline():
  """Ten steps with guidance 7.5, by the functions of the job, over 8 devices."""
  with np.load(SD2 / "expected_text_to_image.npz") as arrays:
    wanted = dict(arrays)
  meta = json.loads(str(wanted["meta"]))
  model, sampler = planned(name="ddim", steps=10)
  mesh = sharding.make_mesh()
  pipeline = text_to_image.pipeline(
    model,
    sampler,
    mesh,
    guidance_scale=7.5,
    prompts=[meta["prompt"]],
    negative_prompt=meta["negative_prompt"],
  )
  _, inputs = pipeline.requests(np.arange(8))

  @jax.jit
  def run(params, x, inputs):
    denoiser, cond = pipeline.denoiser(params, inputs)
    keys = sequential.keys_from_seeds(jnp.arange(8))
    made = sampler_lib.run(sampler, denoiser, x, keys, cond).x
    return made, pipeline.decode(None, params, made)

  x = jnp.asarray(np.moveaxis(wanted["latents_in"], 1, -1))
  latents, pixels = run(model.params, jnp.tile(x, (8, 1, 1, 1)), inputs)
  expected = np.moveaxis(wanted["latents_out"], 1, -1)
  assert np.abs(latents - expected).max() < 1e-3
  assert (
    np.abs(np.asarray(pixels).astype(int) - np.round(wanted["image"] * 255)).max() <= 1
  )


@pytest.mark.parametrize(
  "name",
  [
    "paraddpm",
    pytest.param("paradpmsolver", marks=pytest.mark.slow),
    pytest.param("paraddim", marks=pytest.mark.slow),
  ],
)
@pytest.mark.slow
def test_in_parallel_at_tolerance_0(name):
  """Windows over 4 devices end where the sequential ones do."""
  options = {"steps": 6, "spacing": "trailing", "window": 4, "tolerance": 0.0}
  model, sampler = planned(name=name, **options)
  mesh = sharding.make_mesh(window=4)
  pipeline = text_to_image.pipeline(
    model, sampler, mesh, guidance_scale=7.5, prompts=["a cat", "a dog"]
  )
  seeds, inputs = pipeline.requests(np.arange(2))

  @jax.jit
  def run(params, seeds, inputs):
    denoiser, cond = pipeline.denoiser(params, inputs)
    return [
      samplers.sample(by, denoiser, seeds, model.unet.shape, cond, mesh=over)
      for by, over in ((sampler, mesh), (sampler.sequential(), None))
    ]

  many, one = run(model.params, seeds, inputs)
  np.testing.assert_allclose(many.x, one.x, rtol=1e-4, atol=1e-4)
  assert (one.num_evaluations == 6).all()
  assert (many.num_iterations <= 6).all()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("generate")
  line = generate.run(settings(), str(workdir))
  assert line.startswith("made 5 of 5 images (")
  assert line.endswith(f"{workdir}/images")
  return workdir


@pytest.fixture
def copy(made, tmp_path):
  return shutil.copytree(made, tmp_path / "run")


def test_what_is_written(made):
  summary = json.loads((made / "images.json").read_text())
  rows = summary["images"]
  assert [row["prompt"] for row in rows] == ["a cat", "a dog"] * 2 + ["a cat"]
  assert [row["seed"] for row in rows] == [0, 1, 2, 3, 4]
  assert [row["batch"] for row in rows] == [2, 2, 2, 2, 1]
  assert all(row["seconds"] > 0 and row["num_evaluations"] == 3 for row in rows)
  assert summary["compile_seconds"] > 0
  seconds = sum(row["seconds"] / row["batch"] for row in rows)
  assert summary["images_per_second"] == pytest.approx(5 / seconds)
  assert images(made).shape == (5, 16, 16, 3)
  assert Image.open(made / "images.png").size[0] > 3 * 16


@pytest.mark.slow
def test_only_what_is_missing_is_made(copy):
  before = images(copy)
  (copy / "images" / "00001.png").unlink()
  (copy / "images" / "00003.png").write_bytes(b"half")
  kept = copy / "images" / "00002.png"
  stamp = kept.stat().st_mtime_ns
  line = generate.run(settings(sample__num=6), str(copy))
  assert line.startswith("made 3 of 6 images (")
  assert kept.stat().st_mtime_ns == stamp
  assert np.abs(images(copy)[:5] - before).max() <= 1  # other batches round otherwise
  line = generate.run(settings(sample__num=6), str(copy))
  assert line.startswith("made 0 of 6 images (")


@pytest.mark.slow
def test_blocks_in_a_loop_make_the_same_images(made, tmp_path):
  """Over stacks of sharded weights; images of both kinds lie in one folder."""
  fields = {"generate__scan_blocks": True, "mesh__data": 1, "mesh__fsdp": 2}
  config = settings(**fields)
  model, _ = published_model.from_config(config, mesh=experiments.mesh(config))
  assert "encoder.layers.0-2" in model.params["text_encoder"]
  generate.run(config, str(tmp_path))
  assert np.abs(images(tmp_path) - images(made)).max() <= 1
  assert generate.run(settings(), str(tmp_path)).startswith("made 0 of 5 images (")


@pytest.mark.slow
def test_an_image_depends_on_its_seed_alone(made, tmp_path):
  mesh = {"mesh__data": 8, "mesh__window": 1, "sample__batch_size": 8}
  one = {"sample__num": 1, "generate__prompts": "a dog", "sample__seed": 3}
  generate.run(settings(**mesh, **one), str(tmp_path))
  assert np.abs(images(tmp_path)[0] - images(made)[3]).max() <= 1
  assert np.abs(images(made)[1] - images(made)[3]).max() > 50


@pytest.mark.slow
def test_images_of_other_settings_are_refused(copy):
  before = sorted(copy.rglob("*"))
  for changed, message in (
    ({"sample__guidance": 2.0}, r"00000.png was made .*sample.guidance \(7.5 there, 2"),
    ({"generate__prompts": "a dog"}, r"prompt \(a cat there, a dog now\)"),
    ({"sample__seed": 1}, r"seed \(0 there, 1 now\)"),
    ({"sampler__name": "paraddim"}, r"sampler.name \(ddim there, paraddim now\)"),
  ):
    with pytest.raises(UserError, match=message):
      generate.run(settings(**changed), str(copy))
  assert sorted(copy.rglob("*")) == before


@pytest.mark.slow
def test_a_window_is_timed_once_and_kept(tmp_path, capsys, monkeypatch):
  def choose(sampler, cost, multiple):
    return [autotune.WindowEstimate(2 * multiple, 3.0, 1.0)]

  monkeypatch.setattr(autotune, "autotune_window", choose)
  fields = {"sampler__name": "paraddpm", "sampler__steps": 8, "sample__num": 2}
  fields |= {"sample__guidance": 1.0}
  generate.run(settings(**fields), str(tmp_path))
  assert "sequential sampling needs 8 evaluations," in capsys.readouterr().err
  row = json.loads((tmp_path / "images.json").read_text())["images"][0]
  assert row["sampler.window"] == 8
  generate.run(settings(**fields), str(tmp_path))
  assert "sequential sampling" not in capsys.readouterr().err
  with pytest.raises(UserError, match="images of config.sampler.window=8, not 4;"):
    generate.run(settings(sampler__window=4, **fields), str(tmp_path))


@pytest.mark.slow
def test_a_model_without_text(tmp_path, capsys):
  church = {"generate__folder": str(CHURCH), "generate__prompts": ""}
  church |= {"sample__guidance": 1.0, "sampler__steps": 2, "sample__num": 2}
  church |= {"sample__compare_sequential": True}
  generate.run(settings(**church), str(tmp_path))
  assert images(tmp_path).shape == (2, 16, 16, 3)
  assert (
    json.loads((tmp_path / "images.json").read_text())["images"][0]["prompt"] is None
  )
  for field, value in (("prompts", "a cat"), ("negative_prompt", "blur")):
    config = settings(**church | {f"generate__{field}": value})
    with pytest.raises(UserError, match="takes no text"):
      generate.run(config, str(tmp_path))


@pytest.mark.slow
def test_the_program_of_a_real_model_without_its_weights():
  """From config files alone, for devices that need not be here."""
  found = loading.configs(str(SD2))
  assert [*found] == ["unet", "vae", "text_encoder", "scheduler"]
  model = loading.abstract(found, dtype="bfloat16")
  schedule, sampler = published_model.build_sampler(
    model.schedule, name="paraddpm", steps=9, window=4
  )
  model, mesh = model._replace(schedule=schedule), sharding.make_mesh(window=4)
  pipeline = text_to_image.pipeline(model, sampler, mesh, guidance_scale=7.5)
  call = pipelines.batch_sampler(pipeline, sampler)
  params = text_to_image.params_with_sharding(model, mesh)
  seeds = jax.ShapeDtypeStruct((2,), jnp.int32)
  images, stats = jax.eval_shape(call, params, seeds, pipeline.inputs(2))
  assert (images.shape, images.dtype) == ((2, 16, 16, 3), jnp.uint8)
  assert stats.num_iterations.shape == (2,)
  assert "while" in call.lower(params, 2).as_text()
  with pytest.raises(UserError, match="scheduler: _class_name='Euler'"):
    loading.abstract(found | {"scheduler": {"_class_name": "Euler"}})


# --- Mistakes, through the command line ---------------------------------------------


def refused(monkeypatch, capsys, workdir: pathlib.Path, **changed) -> str:
  """Returns the one line that main says before it exits with code 2."""
  changed = {k.replace("__", "."): v for k, v in changed.items()}
  fields = {name: str(value) for name, value in (FIELDS | changed).items()}
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(main, "_cache_compilations", lambda: None)
  with pytest.raises(SystemExit) as exit:
    main.main(
      ["main", "--config=configs/church.py", f"--workdir={workdir}"]
      + [f"--config.{name}={value}" for name, value in fields.items()]
    )
  said = capsys.readouterr().err
  assert exit.value.code == 2
  assert said.startswith("error: ")
  assert said.count("\n") == 1
  assert not workdir.exists()
  return said


def cut(path) -> None:
  path.write_bytes(path.read_bytes()[:-1000])


def pickled(path) -> None:
  path.with_suffix(".bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
  path.unlink()


def more_tokens(path) -> None:
  found = json.loads(path.read_text())
  found["model"]["vocab"] |= {"extra": 63, "more": 64}
  path.write_text(json.dumps(found))


@pytest.mark.parametrize(
  ("file", "damage", "message"),
  [
    ("unet/diffusion_pytorch_model.safetensors", cut, "safetensors: is damaged"),
    ("vae/diffusion_pytorch_model.safetensors", pickled, "no code of the file was run"),
    ("tokenizer/tokenizer.json", more_tokens, "they do not belong together"),
    ("tokenizer/tokenizer.json", cut, "holds no tokenizer of CLIP"),
    ("scheduler/scheduler_config.json", pathlib.Path.unlink, "does not exist"),
    ("model_index.json", cut, "model_index.json is not valid JSON"),
  ],
)
def test_damaged_folders(monkeypatch, capsys, tmp_path, file, damage, message):
  folder = shutil.copytree(SD2, tmp_path / "model")
  damage(folder / file)
  changed = {"generate__folder": str(folder)}
  assert message in refused(monkeypatch, capsys, tmp_path / "run", **changed)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    (
      {"generate__folder": ""},
      "config.generate.folder is empty: set it to hf://google/ddpm-church-256",
    ),
    ({"generate__folder": "/none"}, "/none: no such folder"),
    ({"generate__prompts": ""}, "config.generate.prompts='': must have texts"),
    ({"generate__prompts": "none.json"}, "none.json does not exist"),
    (
      {"generate__dtype": "int8"},
      "config.generate.dtype='int8': must be one of float32",
    ),
    ({"generate__timestep_spacing": "odd"}, "odd"),
    ({"sampler__name": "rk4"}, "config.sampler.name='rk4': must be a solver"),
    ({"sampler__steps": 0}, "steps"),
    (
      {"sampler__timesteps": (1.0, 0.5)},
      "config.sampler.timesteps=(1.0, 0.5): only for networks",
    ),
    (
      {"sampler__temperature": 0.5},
      "config.sampler.temperature=0.5: only for networks",
    ),
    ({"sampler__name": "paraddim", "sampler__window": 2}, "over the 4 devices along"),
    ({"sampler__name": "paraddim", "sampler__window": 9}, "config.sampler.window=9"),
    ({"sample__batch_size": 3}, "config.sample.batch_size=3: does not divide over 2"),
    (
      {"sample__guidance": 1.0, "generate__negative_prompt": "x"},
      "negative_prompt: has no effect",
    ),
  ],
)
def test_mistakes(monkeypatch, capsys, tmp_path, changed, message):
  assert message in refused(monkeypatch, capsys, tmp_path / "run", **changed)


def test_a_config_of_a_folder_does_not_train():
  config = configs.base()
  config.job = "generate"
  assert main._job(None, config) == "generate"
  assert main._job("generate", config) == "generate"
  with pytest.raises(UserError, match="--job=train: this config is for --job=generate"):
    main._job("train", config)
  config.job = "paint"
  with pytest.raises(UserError, match="config.job=paint: .* demos, .* inspect"):
    main._job(None, config)
