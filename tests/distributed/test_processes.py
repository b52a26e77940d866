"""Two real processes of four devices each, talking over 127.0.0.1."""

import json
import pathlib
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from test_main import ROOT, TINY, command, environment, weights, works

from sdiff_jax.distributed import processes
from sdiff_jax.types import UserError

CONFIG = ("--config=configs/digits_diffusion.py", *TINY, "--config.train.steps=40")


def free_address() -> str:
  """Returns an address of this machine at which nobody listens."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


def start(cache, *args: str, more=((), ())) -> list[subprocess.Popen]:
  """Starts a command as two processes, each with some arguments of its own."""
  names = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
  return [
    subprocess.Popen(
      command(*args, *more[i]),
      cwd=ROOT,
      env=environment(cache, 4) | names | {"JAX_PROCESS_ID": str(i)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]


def finish(both: list[subprocess.Popen], code: int = 0) -> str:
  """Waits for two processes that must end with a code, and returns what they said."""
  said = [process.communicate(timeout=300)[0] for process in both]
  assert [p.returncode for p in both] == [code, code], "\n".join(said)[-4000:]
  return "\n".join(said)


def until(condition, both: list[subprocess.Popen]) -> None:
  deadline = time.monotonic() + 200
  while not condition():
    assert time.monotonic() < deadline, "never came"
    assert both[0].poll() is None, both[0].communicate()[0][-4000:]
    time.sleep(0.02)


def metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
  timed = ("seconds", "images_per_second", "step_seconds", "step_seconds_worst")
  timed += ("data_seconds",)
  with (workdir / "metrics.jsonl").open() as lines:
    rows = [json.loads(line) for line in lines]
  return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def same(a: pathlib.Path, b: pathlib.Path) -> None:
  """Checks that two runs measured the same and ended with the same state, to 1e-5."""
  for mine, theirs in zip(metrics(a), metrics(b), strict=True):
    assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
  same_weights(a, b)


def same_weights(a: pathlib.Path, b: pathlib.Path) -> None:
  def close(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * max(1, np.abs(y).max()))

  jax.tree.map(close, weights(a), weights(b))


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory) -> pathlib.Path:
  """A run on one device."""
  folder = tmp_path_factory.mktemp("alone") / "teacher"
  works(cache, *CONFIG, f"--workdir={folder}")
  return folder


@pytest.fixture(scope="module")
def together(cache, tmp_path_factory) -> pathlib.Path:
  """The same on two processes of four devices."""
  folder = tmp_path_factory.mktemp("together") / "teacher"
  said = finish(start(cache, *CONFIG, f"--workdir={folder}"))
  assert said.count(f"trained 40 steps: {folder}") == 1  # one process speaks
  return folder


def test_two_processes_train_like_one_device(alone, together):
  same(together, alone)
  for name in ("samples/grid_0000012.png", "training.json", "parameters.txt"):
    assert (together / name).exists()


@pytest.mark.slow
def test_eight_devices_of_one_process_train_like_one(cache, alone, tmp_path):
  works(cache, *CONFIG, f"--workdir={tmp_path}", devices=8)
  same(tmp_path, alone)


@pytest.mark.slow
def test_a_student_of_two_processes_and_its_samples(cache, together, tmp_path):
  config = ("--config=configs/digits_scd.py", *TINY)
  config += (f"--config.teacher.workdir={together}", "--config.sample.num=40")
  config += ("--config.sample.batch_size=16",)
  pair, one = tmp_path / "pair", tmp_path / "one"
  finish(start(cache, *config, f"--workdir={pair}", "--config.mesh.fsdp=2"))
  works(cache, *config, f"--workdir={one}")
  same(pair, one)
  sample = (*config, f"--workdir={pair}", "--job=sample")
  images = []
  for run in (lambda: finish(start(cache, *sample)), lambda: works(cache, *sample)):
    run()
    with np.load(pair / "samples.npz") as arrays:
      images.append(arrays["arr_0"])
    (pair / "samples.npz").unlink()
  assert images[0].shape == (40, 8, 8, 1)
  assert len(np.unique(images[0], axis=0)) == 40
  assert np.abs(np.subtract(*images, dtype=int)).max() <= 1


@pytest.mark.slow
def test_sigterm_to_one_stops_both_and_one_device_resumes(cache, alone, tmp_path):
  config = (*CONFIG, f"--workdir={tmp_path}", "--config.checkpoint.every=1")
  both = start(cache, *config)
  until(lambda: list(tmp_path.glob("checkpoints/[0-9]*")), both)
  both[1].send_signal(signal.SIGTERM)
  assert f"repeat the command to resume: {tmp_path}" in finish(both, 75)
  (step,) = {max(int(f.name) for f in (tmp_path / "checkpoints").iterdir())}
  assert 0 < step < 40
  works(cache, *config)
  same_weights(tmp_path, alone)


def test_a_killed_process_ends_the_other_and_both_go_on(cache, alone, tmp_path):
  config = (*CONFIG, f"--workdir={tmp_path}", "--config.checkpoint.every=2")
  both = start(cache, *config)
  until(lambda: list(tmp_path.glob("checkpoints/[0-9]*")), both)
  both[0].kill()
  killed = time.monotonic()
  both[0].communicate()
  both[1].communicate(timeout=60)
  assert both[1].returncode not in (0, None)
  assert time.monotonic() - killed < 60
  assert not (tmp_path / "training.json").exists()  # it was killed on its way
  both = start(cache, *config)
  finish(both)
  same_weights(tmp_path, alone)


@pytest.mark.parametrize("mine", ["", "first", "-1", None])
def test_half_a_description_of_the_processes_is_refused(monkeypatch, mine):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  if mine is None:
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    mine = "0"
  monkeypatch.setenv("JAX_PROCESS_ID", mine)
  with pytest.raises(UserError, match=f"JAX_PROCESS_ID='{mine}': set none of them"):
    processes.start()


def test_processes_of_different_configs_refuse_each_other(cache, tmp_path):
  run = tmp_path / "run"
  config = (*CONFIG, f"--workdir={run}")
  fields = ((), ("--config.train.batch_size=32",))
  both = start(cache, *config, more=fields)
  line = "error: the processes differ: config.train.batch_size (16 in process 0, 32 in "
  assert finish(both, 2).count(line) == 2
  assert not list(tmp_path.iterdir())


def test_sigterm_is_heard_while_training_alone():
  """Afterwards it does what it did before: a study can be stopped between its runs."""
  heard = []
  before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
  try:
    with processes.stopping() as stopping:
      assert not stopping(1)
      signal.raise_signal(signal.SIGTERM)
      assert stopping(1)
      assert not heard
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]
  finally:
    signal.signal(signal.SIGTERM, before)
