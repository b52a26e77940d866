"""Runs whose work directory is in a bucket: the road, kills, several processes."""

import asyncio
import json
import threading
import time

import forked
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command_line import TINY, environment
from quick_xla import xla_flags

from sdiff_jax import main, registry
from sdiff_jax.experiment import build, training
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.io import array_io, file_io, storage
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.training import metric_writer, state, summary
from sdiff_jax.types import UserError

TEACHER = ("--config=configs/digits_diffusion.py", *TINY)
STUDENT = ("--config=configs/digits_scd.py", *TINY, "--config.train.sample_every=0")
# Saves so often that a kill meets one.
OFTEN = ("--config.train.steps=24", "--config.checkpoint.every=8")
OFTEN += ("--config.train.sample_every=0",)


def job(*args: str) -> str:
  """Runs a command in this process, and returns its last line."""
  return main.run(main.parse(["main", *args]))


def start(cache, *args: str) -> forked.Process:
  """Starts a command on as many devices as this process has."""
  env = environment(cache) | {"XLA_FLAGS": xla_flags(devices=8)}
  return forked.start(*args, env=env)


def restored(workdir: str):
  """Returns the newest state of a run."""
  config = workdir_lib.read(workdir)
  experiment = build.build(config)
  trainer = training.build_trainer(config, experiment.network, None, experiment.mesh)
  with checkpoints_lib.Checkpoints(workdir) as checkpoints:
    return checkpoints.restore(trainer.abstract_state())


def half_saved(workdir: str) -> list[str]:
  """Returns the checkpoints that are there in part."""
  folder = f"{workdir}/{checkpoints_lib.FOLDER}"
  steps = map(str, checkpoints_lib.steps(workdir))
  return sorted({*checkpoints_lib._saves(folder)} - {*steps})


def losses(workdir: str) -> dict[int, float]:
  lines = metric_writer.read_metrics(workdir)
  steps = [line["step"] for line in lines]
  assert steps == sorted({*steps})  # each step once
  return {line["step"]: line["loss"] for line in lines}


def assert_equal(a, b) -> None:
  for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    np.testing.assert_array_equal(x, y)


def test_the_road_in_a_bucket(bucket, cache, tmp_path):
  """A teacher that is killed in a save, its student, and all that is made of it."""
  run, here = f"{bucket}/road", tmp_path / "here"
  process = start(cache, *TEACHER, *OFTEN, f"--workdir={run}/teacher")
  while not (half_saved(f"{run}/teacher") and checkpoints_lib.steps(f"{run}/teacher")):
    assert process.poll() is None, process.said()[-3000:]
  process.kill()
  process.wait()
  left = checkpoints_lib.newest(f"{run}/teacher")
  assert left < 24
  assert job(*TEACHER, *OFTEN, f"--workdir={run}/teacher") == (
    f"trained 24 steps: {run}/teacher"
  )
  assert not half_saved(f"{run}/teacher")
  job(*TEACHER, *OFTEN, f"--workdir={here}")
  assert_equal(restored(f"{run}/teacher"), restored(str(here)))
  assert losses(f"{run}/teacher") == losses(str(here))
  assert storage.glob(f"{run}/teacher/tensorboard", "events*")
  assert not storage.exists(f"{run}/teacher/.lock")

  student = (*STUDENT, f"--workdir={run}/student")
  student += (f"--config.teacher.workdir={run}/teacher",)
  job(*student)
  few = ("--config.sample.num=16", "--config.sample.batch_size=16")
  job(*student, *few, "--job=sample")
  assert array_io.npz_headers(f"{run}/student/samples.npz")["arr_0"].shape[0] == 16
  assert not storage.exists(f"{run}/student/samples.parts")
  few = ("--config.evaluate.num=16", "--config.evaluate.batch_size=16")
  few += ("--config.evaluate.pr_num_images=0",)
  few += ("--config.evaluate.samplers=('consistency/1',)",)
  job(*student, *few, "--job=evaluate")
  assert len(json.loads(file_io.read_text(f"{run}/student/evaluate/results.json"))) == 1
  assert job("--job=report", f"--workdir={run}") == f"report: {run}/report.html"
  page = file_io.read_text(f"{run}/report.html")
  assert "sCD" in page
  assert "<img" in page  # the grid of the evaluation
  data = registry.build("data", {"name": "npz", "path": f"{run}/student/samples.npz"})
  assert data.size == 16


def test_a_step_waits_for_nothing_that_is_written(bucket, monkeypatch):
  """A save returns while the bucket takes no object."""
  storage.filesystem()
  import gcsfs

  request, returned = gcsfs.GCSFileSystem._request, threading.Event()
  deadline = time.monotonic() + 60

  async def held(self, method, *args, **options):
    while method == "POST" and not returned.is_set() and time.monotonic() < deadline:
      await asyncio.sleep(0.01)
    return await request(self, method, *args, **options)

  monkeypatch.setattr(gcsfs.GCSFileSystem, "_request", held)
  small = state.create({"w": jnp.zeros(4)}, optax.identity(), ("a",))
  with checkpoints_lib.Checkpoints(f"{bucket}/held") as checkpoints:
    checkpoints.save(1, small)
    returned.set()
    assert time.monotonic() < deadline
  assert checkpoints_lib.steps(f"{bucket}/held") == [1]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(bucket, capsys):
  run = f"{bucket}/damaged"
  job(*TEACHER, "--config.checkpoint.keep=2", f"--workdir={run}")
  steps = checkpoints_lib.steps(run)
  assert steps == [8, 12]
  [lost, *_] = storage.glob(f"{run}/checkpoints/12/ema/d", "*")
  storage.remove(lost)
  assert int(restored(run).step) == 8
  assert "checkpoint 12 is damaged, using 8: the file ema/d/" in capsys.readouterr().err
  assert checkpoints_lib.steps(run) == [8]


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("--workdir=s3://b/run",), "--workdir=s3://b/run: must be a path of this machine"),
    (("--workdir=gs:/b/run",), "--workdir=gs:/b/run: must be a path of this machine"),
    (
      ("--config.init_from=s3://b/run",),
      "config.init_from='s3://b/run': must be a path",
    ),
    (
      ("--config.teacher.workdir=http://b",),
      "config.teacher.workdir='http://b': must be",
    ),
    (
      ("--config.data.name=npz", "--config.data.path=s3://b/x.npz"),
      "config.data.path='s3://b/x.npz': must be a path of this machine, or start with gs",
    ),
    (
      ("--config.data.name=folder", "--config.data.dir=gs://b/images"),
      "config.data.dir='gs://b/images': in a bucket each image would be a request; pack",
    ),
  ],
)
def test_other_places_are_refused_at_once(tmp_path, args, message):
  began = time.monotonic()
  with pytest.raises(UserError) as caught:
    job(*TEACHER, f"--workdir={tmp_path}/run", *args)
  assert str(caught.value).startswith(message)
  assert time.monotonic() - began < 10
  assert summary.read(str(tmp_path / "run")) is None
