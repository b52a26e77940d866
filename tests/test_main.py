"""The command line, as a user meets it: other processes, real files."""

import json
import os
import pathlib
import re
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from command_line import ROOT, TINY, call, command, environment, weights, works
from PIL import Image

# A job in a module outside of the package, and a run of it.
PLUGIN = """
import dataclasses
import os
from sdiff_jax import fields, registry

@dataclasses.dataclass
class Count:
  to: fields.Count = 3

@registry.register("jobs", "count", sections={"count": Count}, runtime=("count",))
def run(config, workdir):
  \"\"\"Counts. Nothing else.\"\"\"
  os.makedirs(workdir, exist_ok=True)
  return f"{config.model.width}: {list(range(config.count.to))}"
"""


@pytest.fixture(scope="module")
def teacher(cache, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("runs") / "teacher"
  config = "--config=configs/digits_diffusion.py"
  line = works(cache, config, f"--workdir={folder}", *TINY)
  assert line == f"trained 12 steps: {folder}"
  return folder


def test_training_leaves_metrics_grids_and_a_summary(teacher):
  lines = (teacher / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]
  grids = sorted(p.name for p in (teacher / "samples").iterdir())
  assert grids == ["grid_0000006.png", "grid_0000012.png"]
  summary = json.loads((teacher / "training.json").read_text())
  assert summary["images"] == 12 * 16
  assert summary["flops"] > 0
  assert list((teacher / "tensorboard").iterdir())


@pytest.mark.parametrize(
  "student",
  ["scd", *(pytest.param(s, marks=pytest.mark.slow) for s in ("sct", "scd.py:guided"))],
)
def test_the_road_from_teacher_to_report(cache, teacher, tmp_path, student):
  file, _, word = student.partition(".py")
  run, guided = tmp_path / "student", ("--config.sample.guidance=1.5",)
  config = f"--config=configs/digits_{file}.py{word}"
  field = "init_from" if file == "sct" else "teacher.workdir"
  train = (config, f"--workdir={run}", f"--config.{field}={teacher}", *TINY)
  assert works(cache, *train) == f"trained 12 steps: {run}"
  small = ("--config.sample.num=30", "--config.sample.batch_size=16")
  line = works(cache, *train, *small, *guided, "--job=sample")
  made = rf"made 30 images \([\d.e+]+ images/s, 2 evaluations each\): {run}/samples.npz"
  assert re.fullmatch(made, line)
  with np.load(run / "samples.npz") as arrays:
    assert arrays["arr_0"].shape == (30, 8, 8, 1)
    assert arrays["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["arr_1"], np.arange(30) % 10)
  assert Image.open(run / "samples.png").size[0] > 8 * 32
  quick = ("--config.evaluate.num=100", "--config.evaluate.batch_size=50")
  works(cache, *train, *quick, *guided, "--job=evaluate")
  rows = json.loads((run / "evaluate" / "results.json").read_text())
  assert [row["evaluations"] for row in rows] == [1, 2]
  assert rows[0]["sampler"] == "consistency/1, guidance 1.5"
  assert all(np.isfinite(row["frechet"]) and row["compute"] > 1 for row in rows)
  line = works(cache, f"--workdir={run}", "--job=report")
  assert line == f"report: {run}/report.html"
  page = (run / "report.html").read_text()
  assert "consistency/2" in page
  assert "data:image/png" in page


@pytest.mark.slow
def test_the_baselines_of_a_teacher(cache, teacher):
  quick = ("--config.evaluate.num=100", "--config.evaluate.batch_size=50")
  config = "--config=configs/digits_diffusion.py"
  works(cache, config, f"--workdir={teacher}", *TINY, *quick, "--job=evaluate")
  rows = json.loads((teacher / "evaluate" / "results.json").read_text())
  found = {(row["model"], row["sampler"]): row for row in rows}
  assert found["teacher", "heun/16"]["evaluations"] == 31
  assert found["teacher", "heun/16"]["compute"] == 1
  for sampler in ("ddim/2", "ddim/4", "ddim/8", "consistency/1", "consistency/2"):
    assert found["teacher", sampler]["kind"] == "baseline"
  half = found["real data", "one half to the other"]["frechet"]
  assert 0 < half < found["Gaussian per class", "full covariance"]["frechet"]


@pytest.mark.slow
def test_an_image_depends_on_its_seed_alone(cache, teacher):
  config = ("--config=configs/digits_diffusion.py", *TINY)
  config += (f"--workdir={teacher}", "--job=sample")

  def images(*args, devices=1):
    works(cache, *config, *args, devices=devices)
    with np.load(teacher / "samples.npz") as arrays:
      return arrays["arr_0"].astype(int)

  one = images("--config.sample.num=12", "--config.sample.batch_size=12")
  two = images("--config.sample.num=12", "--config.sample.batch_size=5")
  mesh = ("--config.mesh.fsdp=2", "--config.sample.batch_size=8")
  many = images("--config.sample.num=12", *mesh, devices=8)
  later = images("--config.sample.num=4", "--config.sample.seed=8")
  # Matmuls round by batch size, which may move a pixel by one level of 256.
  assert np.abs(one - two).max() <= 1
  assert np.abs(one - many).max() <= 1
  assert np.abs(one[8:] - later).max() <= 1
  assert np.abs(one[:4] - later).max() > 50


@pytest.mark.slow
def test_the_road_on_eight_devices(cache, teacher, tmp_path):
  config = ("--config=configs/digits_scd.py", f"--workdir={tmp_path}", *TINY)
  config += (f"--config.teacher.workdir={teacher}", "--config.mesh.fsdp=2")
  assert works(cache, *config, devices=8) == f"trained 12 steps: {tmp_path}"
  assert (tmp_path / "samples" / "grid_0000012.png").exists()
  one, eight = (
    json.loads((d / "training.json").read_text()) for d in (teacher, tmp_path)
  )
  assert 1.3 < eight["flops"] / one["flops"] < 1.75  # counted over all devices
  num = "--config.evaluate.num=100"
  works(cache, *config, num, "--job=evaluate", devices=8)
  odd = "--config.evaluate.batch_size=50"
  done = call(cache, *config, num, odd, "--job=evaluate", devices=8)
  assert done.returncode == 2
  assert "config.evaluate.batch_size=50: does not divide" in done.stderr
  # Killed between its last checkpoint and the summary: the summary comes later.
  (tmp_path / "training.json").unlink()
  works(cache, *config, devices=8)
  assert json.loads((tmp_path / "training.json").read_text()) == eight


@pytest.mark.slow
def test_killed_and_resumed_training_ends_with_the_same_weights(cache, tmp_path):
  config = ("--config=configs/digits_diffusion.py", *TINY, "--config.train.steps=12")
  config += ("--config.checkpoint.every=1", "--config.train.sample_every=0")
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  works(cache, *config, f"--workdir={whole}")
  process = subprocess.Popen(
    command(*config, f"--workdir={killed}"),
    cwd=ROOT,
    env=environment(cache),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 120
  while not list(killed.glob("checkpoints/[0-9]*")) and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (killed / "training.json").exists()  # it was killed on its way
  works(cache, *config, f"--workdir={killed}")
  a, b = weights(whole), weights(killed)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").open("r")]
  assert steps[-1] == 12
  assert len(set(steps)) == len(steps)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(cache, tmp_path):
  config = ("--config=configs/digits_diffusion.py", *TINY, f"--workdir={tmp_path}")
  config += ("--config.train.steps=100000", "--config.checkpoint.every=100000")
  process = subprocess.Popen(
    command(*config),
    cwd=ROOT,
    env=environment(cache),
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  deadline = time.monotonic() + 120
  metrics = tmp_path / "metrics.jsonl"
  while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  said, _ = process.communicate(timeout=30)
  assert process.returncode == 75
  step = int(next(iter((tmp_path / "checkpoints").glob("[0-9]*"))).name)
  assert said.strip().startswith(
    f"stopped at step {step}; repeat the command to resume"
  )
  assert 4 <= step < 100000


@pytest.mark.slow
def test_an_infinite_loss_stops_the_run_with_one_line(cache, tmp_path):
  config = ("--config=configs/digits_diffusion.py", *TINY, f"--workdir={tmp_path}")
  done = call(cache, *config, "--config.optim.learning_rate=1e30")
  assert done.returncode == 2
  line = done.stderr.strip().splitlines()[-1]
  assert line.startswith("error: step ")
  assert "not finite; the last good checkpoint is that of step" in line
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert all(json.loads(line)["loss"] is not None for line in lines)


def test_a_student_unlike_its_teacher_is_refused(refused, teacher, tmp_path):
  config = ("--config=configs/digits_scd.py", f"--workdir={tmp_path / 'run'}")
  wider = (*TINY, "--config.model.width=32", f"--config.teacher.workdir={teacher}")
  assert "config.init_from: another network: " in refused(*config, *wider)


def test_a_workdir_of_another_experiment_is_refused(refused, teacher):
  config = ("--config=configs/digits_diffusion.py", f"--workdir={teacher}", *TINY)
  said = refused(*config, "--config.optim.learning_rate=0.5")
  assert "optim.learning_rate (0.002 there, 0.5 now)" in said


@pytest.mark.slow
def test_timesteps_of_a_sampler_from_the_command_line(cache, refused, teacher):
  config = ("--config=configs/digits_diffusion.py", f"--workdir={teacher}", *TINY)
  config += ("--config.sampler.name=consistency", "--config.sample.num=4")
  angles = "--config.sampler.timesteps=(1.56, 1.3, 0.9)"
  assert ", 3 evaluations each)" in works(cache, *config, angles, "--job=sample")
  said = refused(*config, "--config.sampler.timesteps=(1.1, 1.5)", "--job=sample")
  assert "config.sampler.timesteps=(1.1, 1.5): must decrease" in said


def test_a_job_from_outside_is_one_file(cache, teacher, tmp_path):
  """It brings its fields and their ranges, and runs from the command line."""
  (tmp_path / "counting.py").write_text(PLUGIN)
  env = environment(cache) | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

  def run(*args):
    config = ("--config=configs/digits_diffusion.py", "--config.plugins=counting")
    return subprocess.run(
      command(*config, "--job=count", f"--workdir={tmp_path / 'run'}", *args),
      cwd=ROOT,
      env=env,
      capture_output=True,
      text=True,
      check=False,
    )

  done = run("--config.count.to=2", "--config.model.width=24")
  assert done.stdout == "24: [0, 1]\n", done.stderr
  assert (
    run("--config.count.to=0").stderr
    == "error: config.count.to=0: must be at least 1\n"
  )
