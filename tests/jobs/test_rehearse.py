"""Rehearsals: on simulated devices of this machine, and for absent TPUs."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from html import escape

import jax
import numpy as np
import pytest
from conftest import FIXTURES

from sdiff_jax import config as config_lib
from sdiff_jax.capacity import cache, chips, kernels, lowering, measured, page, report
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import programs, training
from sdiff_jax.jobs import rehearse
from sdiff_jax.pretrained.diffusers import loading
from sdiff_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[2]


TEACHER = """
from sdiff_jax import config

def get_config(width=""):
  c = config.base()
  c.model.update(width=int(width), depth=1)
  return c
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
  """A config file of a teacher, with the word that it takes."""
  file = tmp_path_factory.mktemp("configs") / "teacher.py"
  file.write_text(TEACHER)
  return f"{file}:16"


def config_of_file(name):
  return config_lib.load(str(ROOT / "configs" / name), "missing")


def config_of(teacher):
  """An sCD of one layer, whose data and teacher's run are not there."""
  config = config_lib.base()
  config.model.update(width=16, depth=1)
  config.data = config_lib.component("data", "latents", dir="nowhere")
  config.loss = config_lib.component("losses", "scm", velocity="teacher")
  config.teacher.update(config=teacher, workdir="nowhere")
  config.rehearse.update(shape=(8, 8, 1), classes=10)
  config.rehearse.topology = "v5e:2x4"
  config.train.batch_size = 16
  return config


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
  """Takes the eight devices of this machine for a pod's, and an empty cache."""
  monkeypatch.setattr(chips, "devices", lambda pod: np.array(jax.devices()))
  monkeypatch.setattr(cache, "FOLDER", str(tmp_path / "cache"))
  monkeypatch.setattr(rehearse, "LEVEL", "")


@pytest.fixture(scope="module")
def found(teacher):
  """The facts of a step, compiled once."""
  config = config_of(teacher)
  mesh = sharding.make_mesh(**config.mesh)
  program = programs.build(config, mesh)
  facts = {
    "pod": config.rehearse.topology,
    "devices": 8,
    "persistent_bytes": program.persistent_bytes,
    "changes": {},
  }
  return program, facts | lowering.analyze(program, program.lower(), 8)


def test_kinds_of_memory_are_those_of_a_state(found, teacher):
  """All of it is small, so every device holds it whole: nbytes of arrays."""
  program, _ = found
  config = config_of(teacher)
  source = programs.abstract_dataset(config)
  network = experiments.network(config, source)
  theirs = config_lib.load(config.teacher.config, "missing")
  theirs = experiments.network(theirs, source)
  key = jax.random.key(0)
  frozen = jax.eval_shape(theirs.init, key)
  trainer = training.build_trainer(config, network, theirs, mesh=None)
  state = jax.eval_shape(trainer.create_state, key)

  def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

  assert program.persistent_bytes == {
    "parameters": nbytes(state.params),
    "optimizer": nbytes(state.opt_state),
    "EMA": nbytes(state.ema),
    "teacher": nbytes(frozen),
    "batch": (16 // 8) * (64 * 4 + 4),
  }


def test_arguments_are_what_is_held(found):
  """But for the step's number, the random key, and the teacher's w_phi, not used."""
  program, facts = found
  assert (
    abs(facts["memory"]["arguments"] - sum(program.persistent_bytes.values())) <= 1024
  )


def test_an_array_over_devices_is_a_part_on_each():
  mesh = sharding.make_mesh(2, 4, 1)
  large = jax.ShapeDtypeStruct((2048, 1024), np.float32)
  held = lowering.bytes_per_device([large], [sharding.state(large, mesh)])
  assert held == large.size * 4 // 4


def test_gradients_are_summed_over_the_devices(found):
  program, facts = found
  sent = [c for c in facts["collectives"] if c["kind"] == "all-reduce"]
  assert sum(c["bytes"] for c in sent) >= program.persistent_bytes["parameters"]
  assert {c["group_size"] for c in sent} == {8}


def test_operations_of_a_step_are_those_of_its_networks(found):
  """Teacher, student, its tangent, and backward of one: near 5 of 2 n of a layer."""
  program, facts = found
  forward = 2 * program.num_parameters * 16
  assert 4 < facts["model_flops"] / forward < 7
  # On each device; the optimizer's are those of every parameter on all of them.
  assert 0 < facts["flops"] - facts["model_flops"] / 8 < 50 * program.num_parameters


@pytest.mark.slow
def test_every_block_counts():
  """A transformer's blocks are a loop in training."""
  config = config_of_file("imagenet256_dit_diffusion.py:tiny")
  config.rehearse.update(shape=(8, 8, 4), classes=10)
  config.train.batch_size = 8
  config.model.update(depth=4, unroll=1, attention="plain", remat="")
  program = programs.build(config, sharding.make_mesh(**config.mesh))
  facts = lowering.analyze(program, program.lower(), 8)
  assert 0.95 < facts["flops"] * 8 / facts["model_flops"] < 1.3


def test_what_is_modeled_follows_from_the_facts(found):
  program, facts = found
  summary, chip = program.summary(), chips.CHIPS["v5e"]
  out = report.model(report.Job("train", 1000, 2.0), summary, [facts])
  assert out["fits"]
  # The counts of the compiler and of the kernels are of the same products.
  assert sum(k["flops"] for k in out["kernels"].values()) <= facts["flops"]
  for name, t in out["seconds"].items():
    assert out["images_per_second"][name] == pytest.approx(16 / t)
    assert out["days"][name] == pytest.approx(1000 * t / 86400)
    share = facts["model_flops"] / (t * 8 * chip.peak)
    assert out["utilization"][name] == pytest.approx(share)
  estimate = out["seconds"]["estimate"]
  assert out["seconds"]["ideal"] <= estimate
  assert estimate == pytest.approx(sum(out["terms"].values()) - out["terms"]["ideal"])
  assert out["dollars"] == pytest.approx(8 * 2.0 * 1000 * estimate / 3600)
  assert out["hosts"] == 2
  assert out["images_read_per_host"] == pytest.approx(16 / estimate / 2)
  held = facts["persistent_bytes"]
  state = held["parameters"] + held["optimizer"] + held["EMA"]
  assert state < out["checkpoint"]["bytes"] < state + 100  # and numbers of steps
  assert out["checkpoint"]["seconds"] == pytest.approx(4 * state / 1e9)
  text = page.verdict(out)
  assert "Fits v5e:2x4" in text
  assert "(estimated, uncalibrated), 1,000 steps" in text
  assert text.endswith("dollars.")


def test_a_measured_time_is_taken_before_an_estimate(found, monkeypatch):
  program, facts = found
  known = measured.Measurement(
    "train", "v5e", program.num_parameters, 2, 1, 0.5, "here"
  )
  monkeypatch.setattr(measured, "MEASUREMENTS", (known,))
  out = report.model(report.Job("train", 10), program.summary(), [facts])
  assert out["seconds"]["measured"] == 0.5
  assert page.cells(out)[6] == "500 ms"
  assert page.cells(out)[9] == "5 s"
  assert "A step takes 500 ms (measured), 10 steps 5 s." in page.verdict(out)


def test_the_second_run_compiles_nothing(tmp_path, monkeypatch, capsys, teacher):
  config = config_of(teacher)
  line = rehearse.run(config, str(tmp_path))
  html = tmp_path / "rehearsal/v5e_2x4.html"
  assert line == f"rehearsed: {html}"
  assert "compiling for v5e:2x4" in capsys.readouterr().err
  text, numbers = html.read_text(), html.with_suffix(".json").read_text()
  found = json.loads(numbers)
  assert "src=" not in text
  for cell in page.cells(found):
    assert cell in text
  for value in found["persistent_bytes"].values():
    assert page.size(value) in text
  assert escape(page.verdict(found)) in text
  assert "modeled, not measured" in text
  monkeypatch.setattr(lowering, "analyze", None)
  rehearse.run(config, str(tmp_path))
  assert html.with_suffix(".json").read_text() == numbers
  config.optim.b1 = 0.5  # another program
  with pytest.raises(TypeError):
    rehearse.run(config, str(tmp_path))


@pytest.fixture
def invented(monkeypatch):
  """Takes the place of a compiler: the first program does not fit."""
  tried = []

  def analyze(program, lowered, num_devices, *, gpu):
    tried.append(program)
    memory = dict.fromkeys(("arguments", "outputs", "program"), 1)
    memory["temporaries"] = 10**9 if len(tried) > 1 else 10**11
    kernel = kernels.Kernel("product", 1.0, 1, 1, "")._asdict()
    facts = {"memory": memory, "flops": 1.0, "kernels": [kernel], "collectives": []}
    return facts | {"model_flops": 8.0, "compile_seconds": 0.0}

  monkeypatch.setattr(lowering, "analyze", analyze)


def test_what_makes_it_fit_is_named(tmp_path, invented, teacher):
  rehearse.run(config_of(teacher), str(tmp_path))
  found = json.loads((tmp_path / "rehearsal/v5e_2x4.json").read_text())
  assert [t["fits"] for t in found["attempts"]] == [False, True]
  assert found["attempts"][1]["changes"] == {"mesh.fsdp": 8}
  assert "mesh.fsdp=8" in page.cells(found)


def test_nothing_is_changed_unless_wanted(tmp_path, invented, teacher):
  config = config_of(teacher)
  config.rehearse.fit = False
  rehearse.run(config, str(tmp_path))
  found = json.loads((tmp_path / "rehearsal/v5e_2x4.json").read_text())
  assert not found["fits"]
  assert page.cells(found)[3].startswith("no, 100 GB of 16 GB")


def test_a_table_of_pods(tmp_path, capsys, invented, teacher):
  config = config_of(teacher)
  config.rehearse.topology = "v6e:2x4,v5e:2x4"
  assert rehearse.run(config, str(tmp_path)).endswith("pods.html")
  rows = capsys.readouterr().out.splitlines()
  assert [row.split()[1] for row in rows[2:4]] == ["v6e:2x4", "v5e:2x4"]


def test_a_pass_of_paradigms_sends_less_than_a_window(teacher):
  config = config_of(teacher)
  config.rehearse.program = "sample"
  config.sample.batch_size = 1
  config.sampler.update(name="paraddpm", steps=100, window=64)
  config.mesh.update(data=1, window=8)
  program = programs.build(config, sharding.make_mesh(**config.mesh))
  facts = lowering.analyze(program, program.lower(), 8)
  sent = sum(c["calls"] * c["bytes"] for c in facts["collectives"] if c["in_loop"])
  assert 0 < sent <= 64 * 64 * 4
  assert 32 > program.calls_per_batch > 100 / 64


@pytest.mark.slow
def test_a_published_model_needs_no_weights(tmp_path):
  """The pass of a window over 8 devices, by config files alone."""
  folder = tmp_path / "sd2"
  shutil.copytree(FIXTURES / "tiny-sd2", folder)
  weights = [*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]
  assert weights
  for path in weights:
    path.unlink()
  config = config_of_file("stable_diffusion2.py")
  config.generate.folder = str(folder)
  config.sampler.update(steps=100, window=64)
  config.mesh.update(data=1, window=8)
  config.rehearse.topology = "v5e:2x4"
  rehearse.run(config, str(tmp_path))
  (path,) = (tmp_path / "rehearsal").glob("*.json")
  found = json.loads(path.read_text())
  model = loading.load(str(FIXTURES / "tiny-sd2"))
  of_loop = {k: v for k, v in model.params.items() if k != "vae"}
  count = sum(x.size for x in jax.tree.leaves(of_loop))
  assert found["program"]["num_parameters"] == count
  assert found["persistent_bytes"]["parameters"] == 2 * count  # bytes of bfloat16
  sent = sum(c["calls"] * c["bytes"] for c in found["collectives"] if c["in_loop"])
  assert 0 < sent <= 64 * np.prod(model.unet.shape) * 4
  # Twice the operations of 64 rows without guidance, and little else.
  config.sample.guidance = 1.0
  mesh = sharding.make_mesh(**config.mesh)
  alone = programs.build(config, mesh).flops(False)
  assert found["model_flops"] == pytest.approx(2 * alone, rel=0.01)
  config.sampler.window = 0
  with pytest.raises(UserError, match="window=0: must be set"):
    programs.build(config, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["generate", "train"])
def test_blocks_in_a_loop_count_as_often_as_they_run(tmp_path, job):
  """The program is shorter; its operations, parameters and bytes are the same."""
  folder = shutil.copytree(FIXTURES / "tiny-sd3", tmp_path / "sd3")
  path = folder / "transformer" / "config.json"
  fields = json.loads(path.read_text()) | {"num_layers": 6, "dual_attention_layers": []}
  path.write_text(json.dumps(fields))
  if job == "generate":
    config, section = config_of_file("sd3.py"), "generate"
    config.generate.folder = str(folder)
    config.sampler.update(steps=10, window=8)
  else:
    config, section = config_lib.base(), "model"
    config.teacher.folder = str(folder)
    config.model = config_lib.component("models", "pretrained", folder=str(folder))
    config.loss = config_lib.component("losses", "scm", velocity="teacher")
    config.train.batch_size, config.rehearse.shape = 8, (8, 8, 16)
  config.mesh.update(data=1, window=8)
  found = []
  for scan in (False, True):
    config[section].scan_blocks = scan
    program = programs.build(config, sharding.make_mesh(**config.mesh))
    products = program.lower().as_text().count("dot_general")
    found.append((products, program.flops(False), program.persistent_bytes))
  (longer, *facts), (shorter, *same) = found
  assert shorter < longer - 30  # in five blocks of joint attention
  assert facts == same


@pytest.mark.parametrize(
  ("name", "millions"),
  [
    pytest.param(
      "stable_diffusion2",
      {"unet": 865.911, "vae": 83.654, "text_encoder": 340.388},
      marks=pytest.mark.slow,
    ),
    ("church", {"unet": 113.673}),
  ],
)
def test_config_files_of_published_models(name, millions):
  folder = ROOT / "configs" / "published" / name
  model = loading.abstract(loading.configs(str(folder)))
  counts = {
    k: sum(x.size for x in jax.tree.leaves(v)) / 1e6 for k, v in model.params.items()
  }
  assert counts == pytest.approx(millions, abs=5e-4)


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    (
      "rehearse.topology",
      "v5e",
      "config.rehearse.topology='v5e': must be one such as v5e:1x1",
    ),
    ("rehearse.program", "train it", "'train it': must be one of train, sample"),
    ("train.batch_size", 12, "does not divide over 8 devices"),
    ("mesh.fsdp", 3, "the product must be 8, the number of devices"),
    ("teacher.config", "nofile.py:S", "no such file, and no run there"),
  ],
)
def test_refusals(field, value, words, tmp_path, teacher):
  config = config_of(teacher)
  config.update_from_flattened_dict({field: value})

  def command() -> None:
    config_lib.validate(config)
    rehearse.run(config, str(tmp_path))

  with pytest.raises(UserError, match=re.escape(words)):
    command()


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs libtpu, the compiler for TPUs: pip install -e '.[test,rehearse]'",
)
def test_a_tpu_that_is_not_here(tmp_path):
  """The command of a user, who sets no variable."""
  given = ["--config=configs/imagenet64_diffusion.py:S,tiny", "--job=rehearse"]
  given += ["--config.rehearse.topology=v5e:2x2", "--config.model.dtype=bfloat16"]
  given += ["--config.model.blocks=0", f"--workdir={tmp_path}"]
  outside = ("JAX_", "XLA_", "TPU_", "TF_")
  environment = {k: v for k, v in os.environ.items() if not k.startswith(outside)}
  done = subprocess.run(
    [sys.executable, "-m", "sdiff_jax.main", *given],
    cwd=ROOT,
    env=environment | {"HOME": str(tmp_path)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads((tmp_path / "rehearsal/v5e_2x2.json").read_text())
  assert found["fits"]
  assert {c["group_size"] for c in found["collectives"]} == {4}


def test_texts_of_a_published_network():
  """Without data, its conditions are those that its text encoders make."""
  config = config_lib.base()
  folder = str(FIXTURES / "tiny-sdxl")
  config.model = config_lib.component("models", "pretrained", folder=folder)
  config.rehearse.shape = (8, 8, 4)
  dataset = programs.abstract_dataset(config)
  model = loading.abstract(loading.configs(folder))
  length, sizes = model.lengths["text_encoder"], (model.unet.text, model.unet.pooled)
  shapes = {name: spec.shape for name, spec in dataset.cond.items()}
  wanted = {"text": (length, sizes[0]), "pooled": (sizes[1],)}
  assert shapes == wanted | {f"empty_{name}": s for name, s in wanted.items()}
  network = experiments.network(config, dataset)  # which checks conditions and unit
  batch = {name: spec.batch(2) for name, spec in dataset.cond.items() if name in wanted}
  x, t = (jax.ShapeDtypeStruct(s, np.float32) for s in ((2, 8, 8, 4), (2,)))
  params = jax.eval_shape(network.init, jax.random.key(0))
  F = jax.eval_shape(network.apply, params, x, t, batch)
  assert F.shape == x.shape


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rehearse.topology": "v5e:2x4,v6e:2x4"}, "the training step for one topology"),
    ({"rehearse.program": "sample"}, "is the training step for one topology"),
    ({"rehearse.topology": "h100x8"}, "programs for GPUs are tuned on the GPU"),
  ],
)
def test_programs_that_are_not_saved(teacher, changes, message, tmp_path):
  config = config_of(teacher)
  config.rehearse.save = str(tmp_path / "step.bin")
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=f"config.rehearse.save=.*: .*{message}"):
    rehearse.run(config, str(tmp_path))
