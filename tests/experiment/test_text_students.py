"""Students of a text-to-image teacher: from a folder and captions to prompts."""

import functools
import json
import re

import formula_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES
from PIL import Image

from sdiff_jax import config as configs
from sdiff_jax.diffusion.trigflow import END_TIME
from sdiff_jax.experiment import build, prompts, sampling, teachers
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import encode, evaluate, export, generate, train
from sdiff_jax.jobs import sample as sample_job
from sdiff_jax.pretrained.diffusers import loading, trigflow_network
from sdiff_jax.training import trainer
from sdiff_jax.types import UserError

SD2, SD3 = FIXTURES / "tiny-sd2", str(FIXTURES / "tiny-sd3")
LATENTS = {"mean": (0.0,), "std": (1 / 0.18215,), "latents": True}
# Layers of the further inputs that start at zero.
INPUTS = ("cond_proj", "end_proj", "'guidance_embedder']['linear_2']")
quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
WORDS = ("a cat", "a dog", "two birds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A few images with captions, and their latents and encoded texts."""
  folder = tmp_path_factory.mktemp("text")
  rng = np.random.default_rng(0)
  (folder / "images").mkdir()
  for k in range(16):
    pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "images" / f"{k}.png")
    (folder / "images" / f"{k}.txt").write_text(WORDS[k % 3])
  encode.run(encoding(folder), str(folder / "latents"))
  return folder


@pytest.fixture(scope="module")
def data(folder) -> str:
  return str(folder / "latents")


def encoding(folder, **fields):
  c = configs.base()
  images = {"dir": str(folder / "images"), "image_size": 16}
  c.data = configs.component("data", "captions", **images)
  c.vae = c.text_encoder = str(SD2)
  c.encode.update(batch_size=8, scale="vae", **fields)
  return c


def student(data: str, loss: str, **fields):
  c = configs.base()
  c.data = configs.component("data", "latents", dir=data, scale="vae")
  c.teacher.folder = c.init_from = str(SD2)
  c.model = configs.component("models", "pretrained", folder=str(SD2), guidance=True)
  c.loss = configs.component("losses", loss, guidance=(1.0, 5.0), **fields)
  c.train.update(steps=20, batch_size=8, log_every=10)
  c.sampler.update(name="consistency", steps=1)
  c.sample.update(num=8, batch_size=8, guidance=3.0, prompts="a cat; a dog")
  c.vae = c.text_encoder = str(SD2)
  return c


SLOW = [
  pytest.param(name, marks=pytest.mark.slow) for name in ("sd2", "sd3", "sana", "dit")
]


@pytest.mark.parametrize("name", ["pixart", *SLOW])
def test_further_inputs_start_without_effect(name):
  """A student is its teacher, and its parameters of the inputs have gradients."""
  folder = str(FIXTURES / f"tiny-{name}")
  model = loading.abstract(loading.configs(folder))
  unit = {"mean": (model.vae.shift,), "std": (1 / model.vae.scaling,), "latents": True}
  source = functools.partial(trigflow_network.network, folder, **unit)
  teacher, net = source(), source(guidance=True, end_time=True)
  params = trigflow_network.parameters(folder)["net"]
  start = trigflow_network.parameters(folder, guidance=True)
  fresh = {"net": quickly(net.init)(jax.random.key(0)), "logvar": {}}
  own = trainer.initialize_from(start, fresh)["net"]
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 8, 8, model.unet.shape[-1])), jnp.float32)
  t, cond = jnp.array([0.3, 1.2]), {"label": jnp.array([0, 1])}
  if name != "dit":
    sizes = {"text": (2, 3, model.unet.text), "pooled": (2, model.unet.pooled or 1)}
    cond = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in sizes.items()}
    cond["mask"] = jnp.ones((2, 3))
  further = cond | {"guidance": jnp.array([2.0, 5.0]), END_TIME: t / 2}

  @quickly
  def both(own):
    F, pull = jax.vjp(lambda p: net.apply(p, x, t, further), own)
    return F, pull(jnp.ones_like(F))[0], teacher.apply(params, x, t, cond)

  F, grad, wanted = both(own)
  np.testing.assert_allclose(F, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))
  new = [
    float(jnp.abs(g).max())
    for path, g in jax.tree.leaves_with_path(grad)
    if any(k in jax.tree_util.keystr(path) for k in INPUTS)
  ]
  assert len(new) > 1
  assert min(new) > 1e-6


@pytest.mark.parametrize(
  ("folder", "options", "message"),
  [
    ("tiny-flux", {"end_time": True}, "no place for the end time of a flow map"),
    ("tiny-sd2", {"qk_norm": True}, "no place for the norm of queries and keys"),
  ],
)
def test_inputs_that_a_network_cannot_have(folder, options, message):
  config = loading.configs(str(FIXTURES / folder))["vae"]
  shift, std = config.get("shift_factor") or 0.0, 1 / config["scaling_factor"]
  unit = LATENTS | {"mean": (shift,), "std": (std,)}
  with pytest.raises(ValueError, match=message):
    trigflow_network.network(str(FIXTURES / folder), **unit, **options)


@pytest.mark.slow
def test_the_scale_of_time_and_the_norm_of_queries():
  """The network is given the scaled timestep; the norm is that of Stable Diffusion 3."""
  rng, t = np.random.default_rng(0), jnp.array([0.8])
  params = trigflow_network.parameters(str(SD2))["net"]
  shapes = (1, 8, 8, 4), (1, 3, 24)
  x, text = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
  model = loading.load(str(SD2))
  time = trigflow_network.timestep(model.schedule, 1.0)(t)
  scaled = trigflow_network.network(str(SD2), **LATENTS, time_scale=0.5)
  found = scaled.apply(params, x, t, {"text": text})
  # A v-prediction of unit data is F itself.
  wanted = model.unet.apply(params, x, 0.5 * time, {"text": text})
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  config = loading.configs(str(FIXTURES / "tiny-sd3"))["transformer"]
  changed = trigflow_network.student_config(config | {"qk_norm": None}, qk_norm=True)
  assert changed["qk_norm"] == "rms_norm"


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"sample.prompts": "a cat", "text_encoder": ""}, "config.text_encoder is empty"),
    ({"sample.prompts": ";"}, "config.sample.prompts=';': must have texts"),
    pytest.param(
      {"text_encoder": str(FIXTURES / "tiny-flux")},
      "config.text_encoder=.*: its texts are .*pooled",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_prompts_that_are_refused(data, fields, message):
  c = student(data, "scm")
  c.update_from_flattened_dict(fields)
  with pytest.raises(UserError, match=message):
    prompts.read(c, build.build(c))


def test_prompts_in_turn(data):
  c = student(data, "scm")
  experiment = build.build(c)
  texts = prompts.read(c, experiment)
  assert sorted(texts) == ["empty_text", "text"]
  indices = np.array([5, 2])
  seeds, cond = sampling.seeds_and_conditions(c, experiment, indices, texts)
  assert seeds.tolist() == [5, 2]
  np.testing.assert_array_equal(cond["text"], texts["text"][[1, 0]])
  # Those of the captions, to the rounding of their storage.
  own = experiment.dataset[np.arange(3)][1]["text"]
  np.testing.assert_allclose(texts["text"][0], own[0], rtol=2e-3, atol=1e-5)


def test_tokens_are_encoded_when_they_are_read(folder, data, tmp_path):
  """To the values that the job encode stores of the same captions."""
  encode.run(encoding(folder, captions="tokens"), str(tmp_path))
  own, stored = (build.build(student(path, "scm")) for path in (str(tmp_path), data))
  assert own.dataset.cond == stored.dataset.cond
  assert own.has_texts
  assert own.dataset.digest() != stored.dataset.digest()
  chosen = np.array([5, 0, 2])
  samples = own.dataset[chosen], stored.dataset[chosen]
  jax.tree.map(np.testing.assert_array_equal, *samples)
  for encoder, message in (("", "is empty: name"), (SD3, "its tokenizers are not")):
    c = student(str(tmp_path), "scm")
    c.text_encoder = encoder
    with pytest.raises(UserError, match=f"config.text_encoder.*{message}"):
      build.build(c)


@pytest.mark.slow  # a minute each
@pytest.mark.parametrize(
  ("loss", "fields"),
  [
    ("scm", {"velocity": "teacher"}),
    ("flow_map", {}),
    ("cmt", {}),
    ("rcm", {}),
  ],
)
def test_from_a_folder_to_prompts(data, loss, fields, tmp_path):
  """20 steps, of which 10 after a stop; then images of prompts, with guidance.

  Their CLIP score is measured at the end of training, and by the job evaluate.
  """
  c, workdir = student(data, loss, **fields), str(tmp_path)
  c.train.steps = 10
  c.checkpoint.every = 10
  train.run(c, workdir)
  c.train.update(steps=20, evaluate_every=20)
  folder = str(formula_weights.clip_folder(tmp_path / "clip"))
  c.evaluate.update(features="", clip=folder, num=8, batch_size=8)
  c.evaluate.samplers = ("consistency/1",)
  train.run(c, workdir)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
  assert lines[-1]["step"] == 20
  assert all(np.isfinite(line["loss"]) for line in lines)
  stored = workdir_lib.read(workdir)
  stored.sample.update(c.sample)
  stored.evaluate.update(c.evaluate)
  stored.vae = stored.text_encoder = str(SD2)
  assert "8" in sample_job.run(stored, workdir)
  assert (tmp_path / "samples.png").exists()
  assert teachers.needs_teacher(stored)
  evaluate.run(stored, workdir)
  (row,) = json.loads((tmp_path / "evaluate" / "results.json").read_text())
  assert row["clip_score"] == pytest.approx(lines[-1]["clip_score"], rel=1e-5)
  assert 0 < row["clip_score"] < 100


@pytest.mark.slow  # minutes
def test_rcm_is_trained_resumed_exported_and_read_back(data, tmp_path):
  """The folder has the student without its critic, and makes the run's images."""
  fields = {"student_every": 2, "rollout_steps": 2}
  c, workdir = student(data, "rcm", **fields), str(tmp_path / "run")
  c.train.update(steps=2, log_every=1)
  c.optim.update(b1=0.0, learning_rate=1e-3)
  c.checkpoint.every = 2
  train.run(c, workdir)
  c.train.steps = 6
  train.run(c, workdir)
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  for name, turn in (("matching", 1), ("tangent_norm", 1), ("fake_mse", 0)):
    assert [line[name] > 0 for line in lines] == [k % 2 == turn for k in range(1, 7)]
  out = str(tmp_path / "out")
  c.export.update(format="diffusers", folder=out)
  export.run(c, workdir)
  card = (tmp_path / "out" / "README.md").read_text()
  times = re.search(r'steps=1 --config\.sampler\.timesteps="\((.*?),?\)"', card)[1]
  c.sampler.timesteps = tuple(map(float, times.split(",")))
  sample_job.run(c, workdir)
  by = configs.base()
  by.generate.update(folder=out, distilled_guidance=3.0, prompts=c.sample.prompts)
  by.sampler.update(name="consistency", steps=1)
  by.sample.update(num=8, batch_size=8)
  generate.run(by, str(tmp_path / "made"))
  paths = sorted((tmp_path / "made" / "images").glob("*.png"))
  found = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)
  with np.load(tmp_path / "run" / "samples.npz") as made:
    wanted = made["arr_0"].astype(int)
  assert found.shape == wanted.shape
  assert np.abs(found - wanted).max() <= 2
  assert wanted.std() > 10
