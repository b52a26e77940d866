"""The job that samples: it resumes wherever it was stopped."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import time
import types

import forked
import jax
import numpy as np
import optax
import pytest
from quick_xla import xla_flags

from sdiff_jax import config as configs
from sdiff_jax.data import digits, npz
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.pipelines import CompiledSampler
from sdiff_jax.io import resumable
from sdiff_jax.jobs import sample
from sdiff_jax.training import state
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.types import UserError

SIZE = 8  # images a batch
# One of two processes with two devices each: argv is number, port and work directories.
# The second one is slow to write.
PROCESS = """
import sys, time, jax, numpy as np
number, port, *workdirs = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
from sdiff_jax.experiment import pipelines, sampling, workdir as workdir_lib
from sdiff_jax.io import resumable
from sdiff_jax.jobs import sample
write = resumable.Output.write_part
def slowly(*args, **arrays):
  time.sleep(0.3 * int(number))
  write(*args, **arrays)
resumable.Output.write_part = slowly
for workdir in workdirs:
  config = workdir_lib.read(workdir)
  sample.run(config, workdir)
built, params = workdir_lib.trained(config, workdir)
pipeline = sampling.pipeline(config, built)
sampler = pipelines.batch_sampler(pipeline, sampling.build_sampler(config))
batches = pipelines.batches(pipeline, sampler, params, num=12, batch_size=8)
np.save(f"{workdir}/{number}.npy", np.concatenate([images for images, _ in batches]))
"""


def save(config, workdir: pathlib.Path, step: int) -> None:
  """Saves a network that was not trained, but whose every weight has a say."""
  built = experiments.build(config)
  params = built.network.init(jax.random.key(step))
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(step), len(leaves))
  noisy = [
    x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)
  ]
  params = jax.tree.unflatten(treedef, noisy)
  with Checkpoints(str(workdir), keep=2) as checkpoints:
    created = state.create(params, optax.identity(), tuple(config.ema.profiles))
    checkpoints.save(step, created)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A work directory to copy."""
  config = configs.base()
  config.model = configs.component("models", "mlp", width=16, depth=1)
  config.sampler.update(name="ddim", steps=2)
  config.sample.update(num=30, batch_size=SIZE)
  workdir = tmp_path_factory.mktemp("sample") / "run"
  workdir_lib.save_or_check_config(config, str(workdir), digits.build())
  save(config, workdir, 3)
  return workdir


@pytest.fixture
def copy(trained, tmp_path):
  """Makes copies of the work directory."""
  return lambda name: shutil.copytree(trained, tmp_path / name)


def run(workdir: pathlib.Path, **fields) -> bytes:
  """Runs the job with fields such as num=30; returns what samples.npz is."""
  config = workdir_lib.read(str(workdir))
  for name, value in fields.items():
    section, _, field = name.rpartition("__")
    config[section or "sample"][field] = value
  sample.run(config, str(workdir))
  return (workdir / "samples.npz").read_bytes()


def change(workdir: pathlib.Path, section: str, **fields) -> None:
  """Changes the config that other processes will find."""
  path = workdir / "config.json"
  config = json.loads(path.read_text())
  config[section] |= fields
  path.write_text(json.dumps(config))


def parts(workdir: pathlib.Path) -> list[str]:
  return sorted(p.name for p in workdir.glob("samples.parts/*.npz"))


def images(workdir: pathlib.Path) -> np.ndarray:
  with np.load(workdir / "samples.npz") as arrays:
    return arrays["arr_0"].astype(int)


@pytest.fixture
def watch(monkeypatch):
  """What the job did, `events`; it is stopped as it would start the image `stop`."""
  watched = types.SimpleNamespace(events=[], stop=None)
  start, write = CompiledSampler.__call__, resumable.Output.write_part

  def starting(self, params, seeds, inputs):
    first = int(seeds[0])
    if first == watched.stop:
      raise KeyboardInterrupt
    watched.events.append(("start", first))
    return start(self, params, seeds, inputs)

  def writing(self, name, **arrays):
    write(self, name, **arrays)
    watched.events.append(("write", int(name.split("-")[0])))

  monkeypatch.setattr(CompiledSampler, "__call__", starting)
  monkeypatch.setattr(resumable.Output, "write_part", writing)
  return watched


def stopped(workdir: pathlib.Path, watch, at: int = 24, **fields) -> None:
  """Runs the job until it would start image `at`: all batches but one are written."""
  watch.stop = at
  with pytest.raises(KeyboardInterrupt):
    run(workdir, **fields)
  watch.stop = None
  watch.events.clear()


def starts(watch) -> list[int]:
  return [first for what, first in watch.events if what == "start"]


def test_a_batch_is_under_way_before_the_one_before_is_waited_for(copy, watch):
  run(copy("run"))
  expected = [("start", 0)]
  for first in (0, 8, 16):
    expected += [("start", first + 8), ("write", first)]
  assert watch.events == [*expected, ("write", 24)]


def test_a_stopped_job_goes_on_and_ends_the_same(copy, watch, capsys):
  whole, resumed = copy("whole"), copy("resumed")
  (resumed / "samples").mkdir()  # grids of the training
  wanted = run(whole)
  assert "resuming" not in capsys.readouterr().err
  stopped(resumed, watch)
  assert parts(resumed) == ["00000000-p0.npz", "00000008-p0.npz"]
  (resumed / "samples.parts" / "00000016-p0.npz.tmp").write_bytes(b"PK half")
  assert run(resumed) == wanted
  assert starts(watch) == [16, 24]
  assert "resuming: 16 of 30 images exist" in capsys.readouterr().err
  left = {p.name for p in resumed.iterdir()} - {"checkpoints", "command.txt"}
  assert left == {"config.json", "samples", "samples.npz", "samples.png"}
  with np.load(resumed / "samples.npz") as arrays:
    assert arrays["arr_0"].shape == (30, 8, 8, 1)
    assert arrays["arr_0"].dtype == np.uint8
    assert len(np.unique(arrays["arr_0"], axis=0)) == 30
    np.testing.assert_array_equal(arrays["arr_1"], np.arange(30) % 10)


@pytest.mark.slow
def test_a_killed_process_goes_on(copy, watch):
  whole, killed = copy("whole"), copy("killed")
  num = 4000
  change(killed, "sample", num=num)
  process = forked.start(f"--workdir={killed}", "--job=sample", env=os.environ)
  deadline = time.monotonic() + 120
  while len(parts(killed)) < 2 and time.monotonic() < deadline:
    time.sleep(0.002)
  process.kill()
  process.wait()
  assert process.returncode == -signal.SIGKILL
  there = len(parts(killed))
  wanted = run(whole, num=num)
  watch.events.clear()
  assert run(killed, num=num) == wanted
  assert 2 <= there == num // SIZE - len(starts(watch))


@pytest.mark.parametrize("later", [44, 12])
@pytest.mark.slow
def test_another_number_of_images_later(copy, watch, later):
  whole, resumed = copy("whole"), copy("resumed")
  wanted = run(whole, num=later)
  stopped(resumed, watch)
  assert run(resumed, num=later) == wanted
  assert starts(watch) == [k for k in (16, 24, 32, 40) if k < later]
  assert len(images(resumed)) == later


def test_parts_of_other_samples_are_refused(copy, watch):
  workdir = copy("run")
  stopped(workdir, watch)
  message = (
    r"samples\.parts holds parts of other samples: sample\.seed \(0 there, 1 now\), "
    r"sampler\.timesteps \(\[\] there, \[1\.5\] now\); remove it, or use the same values"
  )
  with pytest.raises(UserError, match=message):
    run(workdir, seed=1, sampler__timesteps=(1.5,))
  for name, value in {"batch_size": 16, "guidance": 2.0, "label": 1}.items():
    with pytest.raises(UserError, match=rf"sample\.{name} \(.* there, {value} now\);"):
      run(workdir, **{name: value})
  save(workdir_lib.read(str(workdir)), workdir, 5)
  with pytest.raises(UserError, match=r"samples: checkpoint \(3 there, 5 now\);"):
    run(workdir)
  assert starts(watch) == []
  assert len(parts(workdir)) == 2
  shutil.rmtree(workdir / "checkpoints" / "5")
  run(workdir)
  assert starts(watch) == [16, 24]


@pytest.mark.slow
def test_settings_without_parts_bind_nobody(copy, watch, monkeypatch):
  workdir = copy("run")
  with monkeypatch.context() as patch:  # killed as it removes the folder
    patch.setattr(shutil, "rmtree", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      run(workdir)
  assert [p.name for p in (workdir / "samples.parts").iterdir()] == ["settings.json"]
  assert run(workdir, seed=1) == run(copy("other"), seed=1)


def test_damaged_parts_are_made_again(copy, watch, capsys):
  whole, resumed = copy("whole"), copy("resumed")
  wanted = run(whole, num=48)
  stopped(resumed, watch, at=40, num=48)
  paths = [resumed / "samples.parts" / name for name in parts(resumed)]
  assert len(paths) == 4
  data = [path.read_bytes() for path in paths]
  paths[0].write_bytes(data[0][: len(data[0]) // 2])
  paths[1].write_bytes(b"")
  paths[2].write_bytes(data[2][:-600] + b"?" + data[2][-599:])  # of a pixel
  assert run(resumed, num=48) == wanted
  assert starts(watch) == [0, 8, 16, 32, 40]
  said = capsys.readouterr().err
  assert [f"{path} is damaged" in said for path in paths] == [True, True, True, False]


@pytest.mark.slow
def test_half_a_batch_is_not_a_batch(copy, watch):
  whole, resumed = copy("whole"), copy("resumed")
  wanted = run(whole)
  stopped(resumed, watch)
  path = resumed / "samples.parts" / "00000008-p0.npz"
  with np.load(path) as part:
    half = {name: part[name][:4] for name in part.files}
  path.unlink()
  np.savez(path.with_name("00000008-p1.npz"), **half)  # of a process that is no more
  assert run(resumed) == wanted
  assert starts(watch) == [8, 16, 24]


@pytest.mark.slow
def test_a_part_is_written_whole_or_not_at_all(copy, watch, monkeypatch):
  workdir = copy("run")

  def half(file, **arrays):
    file.write(b"PK")
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(np, "savez", half)
    with pytest.raises(KeyboardInterrupt):
      run(workdir)
  assert parts(workdir) == []
  assert run(workdir) == run(copy("whole"))


def test_images_of_a_large_job_stay_in_their_parts(copy, monkeypatch):
  whole, large = copy("whole"), copy("large")
  run(whole)
  monkeypatch.setattr(sample, "_stay_in_parts", lambda size: True)
  config = workdir_lib.read(str(large))
  for num in (20, 30):  # the second time the images of the first are there
    config.sample.num = num
    line = sample.run(config, str(large))
    assert line.endswith(f": {large}/samples.parts")
    dataset = npz.build(path=f"{large}/samples.parts")
    pixels, cond = dataset[np.arange(num)]
    np.testing.assert_array_equal(pixels, images(whole)[:num])
    np.testing.assert_array_equal(cond["label"], np.arange(num) % 10)
    assert dataset.size == num
  assert not (large / "samples.npz").exists()
  grids = [(folder / "samples.png").read_bytes() for folder in (whole, large)]
  assert grids[0] == grids[1]


def test_lost_parts_do_not_become_samples(copy, monkeypatch):
  workdir = copy("run")
  write = lambda *args, **arrays: None  # noqa: E731
  monkeypatch.setattr(resumable.Output, "write_part", write)
  with pytest.raises(UserError, match="lost parts: the same command makes them"):
    run(workdir)
  assert not (workdir / "samples.npz").exists()


def test_a_batch_size_that_does_not_divide_is_refused_before_any_work(copy):
  workdir = copy("run")
  with pytest.raises(UserError, match="config.sample.batch_size=12: does not divide"):
    run(workdir, batch_size=12)
  assert not (workdir / "samples.parts").exists()


@pytest.mark.slow
def test_rows_that_several_devices_hold_are_written_once(copy, watch):
  one, mesh = copy("one"), copy("mesh")
  run(one)
  stopped(mesh, watch, mesh__data=4, mesh__window=2)
  for k, name in enumerate(parts(mesh)):
    with np.load(mesh / "samples.parts" / name) as part:
      np.testing.assert_array_equal(part["indices"], np.arange(8 * k, 8 * k + 8))
      assert part["images"].shape == (8, 8, 8, 1)
  run(mesh, mesh__data=4, mesh__window=2)
  # Matmuls round by the rows of a device, which may move a pixel by one level.
  assert np.abs(images(one) - images(mesh)).max() <= 1


def in_two_processes(devices: int, *workdirs: pathlib.Path) -> None:
  """Runs PROCESS twice, each with some devices."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
  env = os.environ | {"XLA_FLAGS": xla_flags(devices)}
  arguments = (port, *map(str, workdirs))
  forked.finish([forked.start(n, *arguments, env=env, script=PROCESS) for n in "01"])


def test_two_processes_share_the_work_and_go_on_with_that_of_one(copy, watch):
  one, spread, same_rows = copy("one"), copy("spread"), copy("same_rows")
  run(one)
  for workdir, window in ((spread, 1), (same_rows, 4)):
    stopped(workdir, watch, at=16)
    change(workdir, "mesh", window=window)
  in_two_processes(2, same_rows, spread)
  for workdir in (spread, same_rows):
    assert np.abs(images(one) - images(workdir)).max() <= 1
    assert not (workdir / "samples.parts").exists()
  for number in "01":
    made = np.load(spread / f"{number}.npy")
    np.testing.assert_array_equal(made, images(spread)[:12])


@pytest.mark.parametrize(
  "name",
  [
    "paraddpm",
    pytest.param("specddpm", marks=pytest.mark.slow),
    pytest.param("srdsddim", marks=pytest.mark.slow),
  ],
)
def test_parallel_samplers_by_name(copy, capsys, name):
  workdir = copy("run")
  config = workdir_lib.read(str(workdir))
  config.sampler.update(name=name, steps=16, window=4)
  config.sample.update(num=16, compare_sequential=True)
  line = sample.run(config, str(workdir))
  assert "evaluations each in" in line
  assert "16 in sequential sampling" in line
  err = capsys.readouterr().err
  assert "sequential sampling" in err
  if name != "specddpm":  # which draws other samples of the same distribution
    assert float(re.search(r"differ by ([\d.e-]+)", err)[1]) < 3


@pytest.mark.slow
def test_a_window_is_chosen_once(copy, watch, capsys):
  """A stopped job resumes with the window that its parts were made with."""
  workdir = copy("run")
  fields = {"sampler__name": "paraddpm", "sampler__steps": 16}
  stopped(workdir, watch, **fields)
  assert "window" in capsys.readouterr().err
  path = workdir / "samples.parts" / "settings.json"
  chosen = json.loads(path.read_text())["window"]
  assert chosen > 0
  watch.stop = None
  run(workdir, **fields)
  assert "iterations," not in capsys.readouterr().err


@pytest.mark.slow
def test_a_coarse_network_is_for_parareal_alone(copy):
  workdir = copy("run")
  with pytest.raises(UserError, match="sampler.coarse_workdir=here: only for srdsddim"):
    run(workdir, sampler__coarse_workdir="here")
  coarse = str(copy("coarse"))
  run(
    workdir, sampler__name="srdsddim", sampler__steps=16, sampler__coarse_workdir=coarse
  )


@pytest.mark.slow
def test_a_window_over_two_processes(copy):
  one, spread = copy("one"), copy("spread")
  fields = {"name": "paraddpm", "steps": 16, "window": 8}
  run(one, num=12, **{f"sampler__{k}": v for k, v in fields.items()})
  change(spread, "sampler", **fields)
  change(spread, "sample", num=12)
  change(spread, "mesh", window=4)
  in_two_processes(4, spread)
  assert np.abs(images(one) - images(spread)).max() <= 1
