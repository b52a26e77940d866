"""Jobs that are killed twenty times, at random moments and in the middle of writes.

The same command ends with results that are equal to the bit to those of an undisturbed
run. tests/training/test_reliability.py does the same to `train`.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import ROOT, TINY, environment, works
from conftest import FIXTURES
from PIL import Image

KILLS = 20
TIMES = {"images_per_second", "seconds", "compile_seconds", "latency", "batch"}
# The command line, but states are saved five times a second, however long that takes.
PROGRAM = """
import runpy, sys
from sdiff_jax.io import snapshot
snapshot.SECONDS, snapshot.FRACTION = 0.2, 1.0
sys.argv[0] = "main"
runpy.run_module("sdiff_jax.main", run_name="__main__")
"""
STUDY = """
from sdiff_jax.experiment import studies

def get_config():
  file = "configs/digits_{}.py".format
  one, two = "evaluate.samplers=('ddim/2',)", "evaluate.samplers=('consistency/1',)"
  runs = {
    "teacher": studies.run(file("diffusion"), one),
    "student": studies.run(file("scd"), two, teacher="teacher"),
    "more": studies.run(file("diffusion"), "evaluate.samplers=('heun/4',)", weights="teacher"),
  }
  return studies.build(
    "tiny", runs, title="A study", lead="Of kills.", x="evaluations", panels=("frechet",),
    seeds=(0, 1), changes=(
      "model.width=16", "model.depth=1", "train.steps=60", "train.sample_every=0",
      "checkpoint.every=10", "evaluate.num=1000", "evaluate.batch_size=50",
      "evaluate.baselines=False",
    ),
  )
"""


def start(cache, *args: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM, *args],
    cwd=ROOT,
    env=environment(cache),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen) -> None:
  said = process.communicate(timeout=600)[1]
  assert process.returncode == 0, said[-3000:]


def files(folder: pathlib.Path) -> dict[str, tuple[float, int]]:
  """Returns time and size of all files."""
  found = {}
  for parent, _, names in os.walk(folder):
    for name in names:
      try:
        status = os.stat(os.path.join(parent, name))
      except FileNotFoundError:
        continue
      found[os.path.join(parent, name)] = status.st_mtime, status.st_size
  return found


def writing(folder: pathlib.Path) -> bool:
  return any(".tmp" in name or "checkpoint-tmp" in name for name in files(folder))


def kill_often(cache, args, whole, killed) -> int:
  """Runs the job in `whole`, and in `killed` with kills; returns their number.

  Args:
    cache: folder of compiled programs.
    args: folder -> arguments of the command.
    whole: folder of the undisturbed run.
    killed: folder of the other.
  """
  finish(start(cache, *args(whole.parent / "compiled")))  # so that all is compiled
  began = time.monotonic()
  process = start(cache, *args(whole))
  before = files(whole)
  while {*files(whole)} == {*before} and process.poll() is None:
    time.sleep(0.01)
  startup = time.monotonic() - began
  finish(process)
  work = time.monotonic() - began - startup
  moments, num_kills, num_writing = random.Random(0), 0, 0
  for k in range(KILLS):
    process = start(cache, *args(killed))
    moment = time.monotonic() + moments.uniform(0.5 * startup, startup + work / 12)
    while time.monotonic() < moment and process.poll() is None:
      time.sleep(0.001)
    while k % 2 and time.monotonic() < moment + 2 and process.poll() is None:
      if writing(killed):
        break
    num_writing += process.poll() is None and writing(killed)
    process.kill()
    process.communicate()
    if process.returncode == 0:
      break
    assert process.returncode == -9
    num_kills += 1
  print(f"{num_kills} kills, {num_writing} in writes; {startup:.1f} s + {work:.1f} s")
  finish(start(cache, *args(killed)))
  return num_kills


def without_times(value):
  """Returns results without what is measured by a clock."""
  if isinstance(value, dict):
    return {k: without_times(v) for k, v in value.items() if k not in TIMES}
  return [without_times(v) for v in value] if isinstance(value, list) else value


def results(path: pathlib.Path):
  return without_times(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def teacher(cache, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("kills") / "teacher"
  works(cache, "--config=configs/digits_diffusion.py", *TINY, f"--workdir={folder}")
  return folder


@pytest.fixture
def copies(teacher, tmp_path):
  for name in ("compiled", "whole", "killed"):
    subprocess.run(["cp", "-r", teacher, tmp_path / name], check=True)
  return tmp_path / "whole", tmp_path / "killed"


@pytest.mark.slow
def test_sample(cache, copies):
  config = ("--config=configs/digits_diffusion.py", *TINY, "--job=sample")
  config += ("--config.sample.num=20000", "--config.sample.batch_size=50")
  kills = kill_often(cache, lambda f: (*config, f"--workdir={f}"), *copies)
  assert kills > KILLS // 3
  a, b = ((f / "samples.npz").read_bytes() for f in copies)
  assert a == b


@pytest.mark.slow
def test_evaluate(cache, copies, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))  # of the cache of references
  config = ("--config=configs/digits_diffusion.py", *TINY, "--job=evaluate")
  config += ("--config.evaluate.num=8000", "--config.evaluate.batch_size=50")
  config += ("--config.evaluate.samplers=('heun/8', 'ddim/4')",)
  kills = kill_often(cache, lambda f: (*config, f"--workdir={f}"), *copies)
  assert kills > KILLS // 3
  a, b = (results(f / "evaluate" / "results.json") for f in copies)
  assert a == b
  for name in ("heun-8.png", "ddim-4.png"):
    a, b = ((f / "evaluate" / name).read_bytes() for f in copies)
    assert a == b


@pytest.mark.slow
def test_encode(cache, tmp_path):
  pixels = np.random.default_rng(0).integers(
    0, 256, (12_000, 16, 16, 3), dtype=np.uint8
  )
  np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(12_000) % 3)
  (tmp_path / "config.py").write_text(
    "from sdiff_jax import config as configs\n"
    "def get_config():\n"
    "  c = configs.base()\n"
    "  c.job = 'encode'\n"
    f"  c.data = configs.component('data', 'npz', path='{tmp_path}/images.npz')\n"
    f"  c.vae = '{FIXTURES}/tiny-sd2'\n"
    "  c.encode.update(batch_size=8, shard_size=500)\n"
    "  return c\n"
  )
  config = f"--config={tmp_path}/config.py"
  folders = tmp_path / "whole", tmp_path / "killed"
  kills = kill_often(cache, lambda f: (config, f"--workdir={f}"), *folders)
  assert kills > KILLS // 3
  a, b = ({p.name: p.read_bytes() for p in f.glob("lat*")} for f in folders)
  assert len(a) == 25
  assert a == b


@pytest.mark.slow
def test_generate(cache, tmp_path):
  config = ("--config=configs/stable_diffusion2.py", "--config.generate.prompts=a;b")
  config += (f"--config.generate.folder={FIXTURES}/tiny-sd2", "--config.sample.num=300")
  config += ("--config.sample.batch_size=2", "--config.sampler.steps=3")
  config += ("--config.sampler.name=ddim",)
  folders = tmp_path / "whole", tmp_path / "killed"
  kills = kill_often(cache, lambda f: (*config, f"--workdir={f}"), *folders)
  assert kills > KILLS // 3
  names = [sorted(p.name for p in (f / "images").iterdir()) for f in folders]
  assert names[0] == names[1]
  assert len(names[0]) == 300
  for name in names[0]:
    a, b = (np.asarray(Image.open(f / "images" / name)) for f in folders)
    np.testing.assert_array_equal(a, b)
  a, b = (results(f / "images.json")["images"] for f in folders)
  assert a == b


@pytest.mark.slow
def test_demos(cache, tmp_path):
  pytest.importorskip("gym_pusht")
  config = ("--config=configs/pusht_diffusion.py", "--job=demos")
  config += ("--config.demos.episodes=12",)

  def args(folder):
    path = f"--config.data.path={folder}/demos.npz"
    return (*config, path, f"--workdir={folder}")

  folders = tmp_path / "whole", tmp_path / "killed"
  kills = kill_often(cache, args, *folders)
  assert kills > KILLS // 3
  arrays = [dict(np.load(f / "demos.npz")) for f in folders]
  assert arrays[0].keys() == arrays[1].keys()
  for name, x in arrays[0].items():
    np.testing.assert_array_equal(x, arrays[1][name])
  assert [p.name for p in folders[1].iterdir()] == ["demos.npz"]


@pytest.mark.slow
def test_study(cache, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))  # of the cache of references
  (tmp_path / "study.py").write_text(STUDY)
  config = f"--config={tmp_path}/study.py"
  folders = tmp_path / "whole", tmp_path / "killed"
  kills = kill_often(cache, lambda f: (config, f"--workdir={f}"), *folders)
  assert kills > KILLS // 3
  a, b = (results(f / "tiny.json") for f in folders)
  assert a == b
  assert len(a) == 6
