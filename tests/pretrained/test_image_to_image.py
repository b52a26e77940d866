"""Sampling that starts from noised images, against diffusers, and in parallel."""

import json

import jax.numpy as jnp
import numpy as np
import peer_pipelines
import pytest
from closed_forms import mixture_mean, run_recurrence
from conftest import FIXTURES
from PIL import Image

from sdiff_jax import config as configs
from sdiff_jax import samplers
from sdiff_jax.experiment import published_model, start_images
from sdiff_jax.io import image_io
from sdiff_jax.jobs import generate
from sdiff_jax.pretrained.diffusers import loading, scheduler
from sdiff_jax.samplers import paradigms, sequential
from sdiff_jax.types import UserError

with np.load(FIXTURES / "image_to_image.npz") as stored:
  PEER = dict(stored)
RUNS, META = json.loads(str(PEER["runs"])), json.loads(str(PEER["meta"]))
MIXTURE = {k: PEER[k] for k in ("means", "stds", "weights")}
DIT = FIXTURES / "tiny-dit"


def noise(i: int) -> np.ndarray:
  """Returns the noise of step i, [3, 4], as the script of the fixture has it."""
  return 2**0.5 * np.sin(1.7 * np.arange(12.0) + 0.9 * i).reshape(3, 4)


@pytest.mark.parametrize("name", RUNS)
def test_schedulers(name):
  """Timesteps and last states of eight schedulers, from noised data."""
  run = RUNS[name]
  schedule = scheduler.from_config(
    {"_class_name": f"{run['class']}Scheduler"} | run["config"]
  )
  table = scheduler.tableau(schedule, run["steps"], strength=run["strength"])
  time = np.round(table.time) if schedule.whole == "round" else table.time
  np.testing.assert_allclose(time, PEER[f"{name}/timesteps"], rtol=1e-5, atol=1e-6)
  alphas = dict(zip(table.time, table.alpha, strict=True))

  def denoise(x, time):
    alpha = alphas[time]
    return mixture_mean(MIXTURE, x, alpha, (1 - alpha**2) ** 0.5)

  x = table.alpha[0] * PEER["x0"] + table.init_std * PEER["noise"]
  draws = [noise(i) for i in range(table.evaluations)]
  x = run_recurrence(table, x, denoise, draws)
  np.testing.assert_allclose(x, PEER[f"{name}/final"], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
  ("name", "sampler"),
  [
    pytest.param("tiny-sd2", "paraddim", marks=pytest.mark.slow),
    pytest.param("tiny-sdxl", "paraeuler", marks=pytest.mark.slow),
    pytest.param("tiny-sd3", "paraddim", marks=pytest.mark.slow),
    pytest.param("tiny-flux", "paraddim", marks=pytest.mark.slow),
  ],
)
def test_folders(name, sampler):
  """Of ten steps, strength 0.75 takes 7, and 8 of a flow model, as in diffusers."""
  x = {k: PEER[f"{name}/{k}"] for k in ("z", "eps", "latents_out")}
  x = {k: np.moveaxis(v, 1, -1) for k, v in x.items()}
  guided = {"distilled_guidance": 5.0, "guidance_scale": 1.0}
  if name != "tiny-flux":
    guided = {"guidance_scale": 5.0, "negative_prompt": META["negative_prompt"]}
  made = peer_pipelines.run(
    loading.load(str(FIXTURES / name)),
    x["z"],
    name=sampler,
    steps=META["steps"],
    strength=META["strength"],
    image=PEER[f"{name}/image"][None],
    eps=x["eps"],
    prompts=[META["prompt"]],
    **guided,
  )
  steps = 8 if name in ("tiny-sd3", "tiny-flux") else 7
  assert np.abs(made.one - x["latents_out"]).max() < 1e-4 * np.abs(made.one).max()
  peer_pipelines.check_in_parallel(made, steps)


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral"])
def test_one_door(name, monkeypatch):
  """`samplers.sample` noises given data; both loops end alike, to the bit.

  Each operation of the model rounds once, so that rows come out alike in any program.
  """
  monkeypatch.setattr(paradigms, "ULPS", 0)
  schedule = scheduler.from_config({"_class_name": "DDIMScheduler"})._replace(kind="x0")
  options = {"steps": 12, "strength": 0.6, "window": 3, "tolerance": 0.0}
  schedule, many = published_model.build_sampler(
    schedule, name=f"para{name}", **options
  )
  x0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 4)), jnp.float32)

  def predict(x, time, cond):
    return x / (1 + jnp.abs(x) + time[:, None] / 1024)

  denoiser = scheduler.denoiser(predict, schedule, many.tableau)

  @peer_pipelines.quickly
  def run(seeds, x0):
    return [
      samplers.sample(by, denoiser, seeds, (4,), x0=x0)
      for by in (many, many.sequential())
    ]

  made = run(np.arange(3), x0)
  np.testing.assert_array_equal(made[0].x, made[1].x)
  assert (made[1].num_evaluations == 7).all()
  keys, table = sequential.keys_from_seeds(np.arange(3)), many.tableau
  start = table.alpha[0] * x0 + table.init_std * sequential.noise(keys, -1, (4,))
  draws = [np.asarray(sequential.noise(keys, i, (4,))) for i in range(7)]
  wanted = run_recurrence(
    table, np.asarray(start), lambda x, t: x / (1 + np.abs(x) + t / 1024), draws
  )
  np.testing.assert_allclose(made[0].x, wanted, rtol=1e-4, atol=1e-5)


def picture(path, size: tuple[int, int], seed: int = 0) -> str:
  pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(path)
  return str(path)


def test_images_cover_the_size(tmp_path):
  """An image of the size is taken as it is, others from the center."""
  path = picture(tmp_path / "a.png", (16, 24))
  pixels = np.asarray(Image.open(path))
  np.testing.assert_array_equal(start_images.read(path, (16, 24, 3)), pixels)
  np.testing.assert_array_equal(start_images.read(path, (16, 16, 3)), pixels[:, 4:20])
  np.testing.assert_array_equal(start_images.read(path, (8, 24, 3)), pixels[4:12])
  assert start_images.read(path, (32, 24, 1)).shape == (32, 24, 1)


def test_job(tmp_path):
  """Images take turns, and every PNG says which one it started from."""
  (tmp_path / "in").mkdir()
  names = [picture(tmp_path / "in" / f"{k}.png", (16, 20), k) for k in range(2)]
  config = configs.base()
  config.generate.update(folder=str(DIT), labels="0", image=str(tmp_path / "in"))
  config.generate.strength = 0.5
  config.sampler.update(name="ddim", steps=4)
  config.sample.update(num=3, batch_size=8)
  assert "2 evaluations each" in generate.run(config, str(tmp_path / "a"))
  rows = json.loads((tmp_path / "a" / "images.json").read_text())["images"]
  assert [row["image"] for row in rows] == ["0.png", "1.png", "0.png"]
  assert "generate.strength" in image_io.about(tmp_path / "a" / "images" / "00000.png")
  assert "made 0 of 3" in generate.run(config, str(tmp_path / "a"))
  config.generate.image = names[0]
  with pytest.raises(UserError, match="made with other settings: .*image"):
    generate.run(config, str(tmp_path / "a"))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"strength": 0.3}, "strength=0.3: has no effect without config.generate.image"),
    ({"image": "none.png"}, "image='none.png': must be an image, or a folder of im"),
    ({"image": "IMAGE", "strength": 0.1}, "generate.strength=0.1: takes 0 of steps=4;"),
    ({"image": "TEXT"}, "text.png cannot be read"),
    ({"image": "EMPTY"}, "image=.*: no images in"),
  ],
)
def test_wrong_fields(tmp_path, fields, message):
  (tmp_path / "empty").mkdir()
  (tmp_path / "text.png").write_text("no image")
  places = {"TEXT": str(tmp_path / "text.png"), "EMPTY": str(tmp_path / "empty")}
  places["IMAGE"] = picture(tmp_path / "a.png", (16, 16))
  config = configs.base()
  config.generate.update(folder=str(DIT))
  config.sampler.update(name="ddim", steps=4)
  config.sample.batch_size = 8
  config.generate.update({k: places.get(v, v) for k, v in fields.items()})
  with pytest.raises(UserError, match=message):
    generate.run(config, str(tmp_path / "b"))
