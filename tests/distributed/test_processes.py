"""Real processes of a few devices each, talking over 127.0.0.1."""

import json
import pathlib
import signal
import time

import forked
import jax
import numpy as np
import pytest
from command_line import TINY, environment, weights
from several_processes import start

from sdiff_jax.distributed import processes
from sdiff_jax.types import UserError

CONFIG = ("--config=configs/digits_diffusion.py", *TINY, "--config.train.steps=40")


def alone_on(cache, devices: int, *args: str) -> None:
  """Runs a command in one process."""
  forked.finish([forked.start(*args, env=environment(cache, devices))])


def until(condition, both: list[forked.Process]) -> None:
  deadline = time.monotonic() + 200
  while not condition():
    assert time.monotonic() < deadline, "never came"
    assert both[0].poll() is None, both[0].said()[-4000:]
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
  alone_on(cache, 1, *CONFIG, f"--workdir={folder}")
  return folder


@pytest.fixture(scope="module")
def together(cache, tmp_path_factory) -> pathlib.Path:
  """The same on two processes of four devices."""
  folder = tmp_path_factory.mktemp("together") / "teacher"
  said = forked.finish(start(cache, *CONFIG, f"--workdir={folder}"))
  assert said.count(f"trained 40 steps: {folder}") == 1  # one process speaks
  return folder


def test_two_processes_train_like_one_device(alone, together):
  same(together, alone)
  for name in ("samples/grid_0000012.png", "training.json", "parameters.txt"):
    assert (together / name).exists()


@pytest.mark.slow
def test_eight_devices_of_one_process_train_like_one(cache, alone, tmp_path):
  alone_on(cache, 8, *CONFIG, f"--workdir={tmp_path}")
  same(tmp_path, alone)


@pytest.mark.slow
def test_a_student_of_two_processes_and_its_samples(cache, together, tmp_path):
  config = ("--config=configs/digits_scd.py", *TINY)
  config += (f"--config.teacher.workdir={together}", "--config.sample.num=40")
  config += ("--config.sample.batch_size=16",)
  pair, one = tmp_path / "pair", tmp_path / "one"
  forked.finish(start(cache, *config, f"--workdir={pair}", "--config.mesh.fsdp=2"))
  alone_on(cache, 1, *config, f"--workdir={one}")
  same(pair, one)
  sample = (*config, f"--workdir={pair}", "--job=sample")
  images = []
  for run in (
    lambda: forked.finish(start(cache, *sample)),
    lambda: alone_on(cache, 1, *sample),
  ):
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
  assert f"repeat the command to resume: {tmp_path}" in forked.finish(both, 75)
  (step,) = {max(int(f.name) for f in (tmp_path / "checkpoints").iterdir())}
  assert 0 < step < 40
  alone_on(cache, 1, *config)
  same_weights(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "count"), [(0, 2), (1, 4), (1, 1)])
def test_a_killed_process_ends_the_other_and_any_number_goes_on(
  cache, alone, tmp_path, victim, count
):
  config = (*CONFIG, f"--workdir={tmp_path}", "--config.checkpoint.every=2")
  config += ("--config.train.sample_every=0",)
  both = start(cache, *config)
  until(lambda: list(tmp_path.glob("checkpoints/[0-9]*")), both)
  both[victim].kill()
  killed = time.monotonic()
  both[1 - victim].wait(timeout=60)
  assert both[1 - victim].returncode not in (0, None)
  assert time.monotonic() - killed < 60
  assert both[victim].wait() is not None
  assert both[victim].returncode == -9
  assert not (tmp_path / "training.json").exists()  # it was killed on its way
  forked.finish(start(cache, *config, count=count))
  same_weights(tmp_path, alone)


@pytest.mark.slow
def test_four_processes_train_like_one_device(cache, alone, tmp_path):
  forked.finish(start(cache, *CONFIG, f"--workdir={tmp_path}", count=4))
  same(tmp_path, alone)


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
  assert forked.finish(both, 2).count(line) == 2
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
