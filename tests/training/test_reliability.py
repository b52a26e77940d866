"""What a run survives: full disks, missing permissions, and kill -9 at any moment."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from command_line import ROOT, TINY, call, command, environment, weights, works

from sdiff_jax.experiment.workdir import errors
from sdiff_jax.io import file_io
from sdiff_jax.training.checkpoints import newest

CONFIG = (
  "--config=configs/digits_diffusion.py",
  *TINY,
  "--config.train.sample_every=0",
)


@pytest.fixture
def disk(tmp_path):
  """Returns a function that makes a file system of so many megabytes."""
  folder = tmp_path / "disk"
  folder.mkdir()

  def mount(megabytes: int) -> pathlib.Path:
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    if subprocess.run(["mount", *options], check=False).returncode:
      pytest.skip("this user may not mount")
    return folder

  yield mount
  subprocess.run(["umount", "--lazy", folder], capture_output=True, check=False)


def fill(folder: pathlib.Path) -> pathlib.Path:
  """Takes all the space that there is."""
  path = folder / "fill"
  with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
    while True:
      file.write(bytes(4096))
  return path


def start(cache, *args: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
  return subprocess.Popen(
    [*prefix, *command(*args)],
    cwd=ROOT,
    env=environment(cache),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def refused(process: subprocess.Popen) -> str:
  """Returns the one line of a process that must end, soon, with code 2."""
  try:
    said = process.communicate(timeout=100)[1]
  finally:
    process.kill()
  assert process.returncode == 2, said[-3000:]
  return said.strip().splitlines()[-1]


def until(condition, process: subprocess.Popen) -> None:
  deadline = time.monotonic() + 200
  while not condition():
    assert process.poll() is None, process.stderr.read()[-3000:]
    assert time.monotonic() < deadline
    time.sleep(0.001)


@pytest.mark.slow
def test_a_workdir_below_a_file_is_refused(cache, tmp_path):
  (tmp_path / "file").touch()
  workdir = tmp_path / "file" / "run"
  line = refused(start(cache, *CONFIG, f"--workdir={workdir}"))
  assert line.startswith(f"error: --workdir={workdir}: {tmp_path}/file is not a direc")


@pytest.mark.slow
def test_missing_permission_is_one_line(cache, tmp_path):
  drop = ()
  if os.getuid() == 0:  # root without the right to ignore permissions
    if not shutil.which("setpriv"):
      pytest.skip("no setpriv")
    drop = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
  closed = tmp_path / "closed"
  closed.mkdir(mode=0o555)
  line = refused(start(cache, *CONFIG, f"--workdir={closed}/a/run", prefix=drop))
  assert line.startswith(f"error: --workdir={closed}/a/run: {closed} is not a direc")
  run = tmp_path / "run"
  checkpoints = run / "checkpoints"
  checkpoints.mkdir(mode=0o555, parents=True)
  config = (*CONFIG, f"--workdir={run}", "--config.train.steps=1000")
  line = refused(start(cache, *config, prefix=drop))
  denied = f"{checkpoints}: Permission denied"
  remedy = "; change the permissions, then repeat the command to resume"
  assert line == f"error: {denied}{remedy}"
  assert not (run / "metrics.jsonl").exists()
  checkpoints.chmod(0o755)
  process = start(cache, *config, prefix=drop)
  until(lambda: newest(run), process)
  checkpoints.chmod(0o555)  # now Orbax's threads must not keep the process
  line = refused(process)
  good = f"; the last good checkpoint is that of step {newest(run)}"
  assert line.startswith(f"error: {checkpoints}")
  assert line.endswith(f"Permission denied{good}{remedy}")


def test_a_disk_that_is_too_small_is_refused_before_training(cache, disk):
  run = disk(1) / "run"
  big = "--config.model.width=128"
  line = refused(start(cache, *CONFIG, big, f"--workdir={run}"))
  assert line.startswith(f"error: {run}: 3 more checkpoints of ")
  assert " MB are free; free space, use another directory, or keep fewer" in line
  assert not (run / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_loses_nothing(cache, disk):
  folder = disk(4)
  run = folder / "run"
  config = (*CONFIG, f"--workdir={run}", "--config.train.steps=1000")
  config += ("--config.checkpoint.every=20",)
  process = start(cache, *config)
  until(lambda: newest(run), process)
  filled = fill(folder)
  line = refused(process)
  good = newest(run)
  assert "No space left on device; the last good checkpoint is that of step " in line
  assert f"step {good}; free space, then repeat the command to resume" in line
  assert "No space left on device" in refused(start(cache, *config))  # still full
  filled.unlink()
  assert int(weights(run).step) == good
  assert works(cache, *config) == f"trained 1000 steps: {run}"
  steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open("r")]
  assert steps == sorted(set(steps))
  filled = fill(folder)
  assert "No space left on device" in refused(start(cache, *config, "--job=sample"))


def test_a_text_is_replaced_at_one_stroke(disk):
  folder = disk(1)
  path = folder / "config.json"
  file_io.write_text(path, "old")
  fill(folder)
  with pytest.raises(OSError, match="No space"):
    file_io.write_text(path, "new" * 9999)
  assert path.read_text() == "old"


@pytest.mark.slow
def test_a_fault_of_ours_has_a_traceback(cache, tmp_path):
  with pytest.raises(FileNotFoundError), errors(str(tmp_path)):
    (tmp_path / "none").read_text()
  broken = (
    "import runpy, sys; from sdiff_jax.experiment import build; "
    "build.build = lambda *args: open('/none'); sys.argv[0] = 'main'; "
    "runpy.run_module('sdiff_jax.main', run_name='__main__')"
  )
  done = subprocess.run(
    [sys.executable, "-c", broken, *CONFIG, f"--workdir={tmp_path}"],
    cwd=ROOT,
    env=environment(cache),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert "Traceback" in done.stderr


@pytest.mark.slow
def test_killed_twenty_times_training_ends_with_the_same_weights(cache, tmp_path):
  config = (*CONFIG, "--config.train.steps=2000", "--config.checkpoint.every=3")
  config += ("--config.train.log_every=20",)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  began = time.monotonic()
  process = start(cache, *config, f"--workdir={whole}")
  until(lambda: newest(whole), process)
  startup = time.monotonic() - began
  process.communicate()
  assert process.returncode == 0

  def saving() -> bool:
    return any("tmp" in name for name in os.listdir(killed / "checkpoints"))

  moments = random.Random(0)
  kinds = ["starting"] * 6 + ["stepping"] * 7 + ["saving"] * 7
  moments.shuffle(kinds)
  interrupted = []
  for kind in kinds:
    before = newest(killed)
    process = start(cache, *config, f"--workdir={killed}")
    if kind == "starting":
      time.sleep(moments.uniform(0, startup))
    else:
      until(lambda: newest(killed) != before, process)  # noqa: B023
      time.sleep(moments.uniform(0, 1))
    if kind == "saving":
      until(saving, process)
    process.kill()
    process.communicate()
    assert process.returncode == -9, f"it ended before it was killed: {kind}"
    interrupted.append(kind == "saving" and saving())
    print(f"killed {kind}, newest checkpoint {newest(killed)}, mid-save {saving()}")
  assert sum(interrupted) >= 5
  assert not (killed / "training.json").exists()
  works(cache, *config, f"--workdir={killed}")
  assert "damaged" not in call(cache, *config, f"--workdir={killed}").stderr
  jax.tree.map(np.testing.assert_array_equal, weights(whole), weights(killed))
  steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").open("r")]
  assert steps[-1] == 2000
  assert steps == sorted(set(steps))
