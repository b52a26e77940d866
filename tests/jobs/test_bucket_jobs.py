"""Jobs in a bucket that are killed at random moments, and jobs of two processes."""

import json
import random
import time

import forked
import jax
import numpy as np
import pytest
from command_line import environment
from conftest import FIXTURES
from several_processes import start
from test_buckets import TEACHER, assert_equal, half_saved, job, losses, restored
from test_kills import without_times

from sdiff_jax import registry
from sdiff_jax.io import array_io, file_io, storage

TIMES_KILLED = 5  # of each of four jobs
LONG = ("--config.train.steps=60", "--config.checkpoint.every=12")
LONG += ("--config.train.sample_every=0",)
ENCODE = """
from sdiff_jax import config as configs
def get_config():
  c = configs.base()
  c.job = 'encode'
  c.data = configs.component('data', 'npz', path='{images}')
  c.vae = '{vae}'
  c.encode.update(batch_size=8, shard_size=40)
  return c
"""


def write_images(path: str) -> None:
  pixels = np.random.default_rng(0).integers(0, 256, (400, 16, 16, 3), dtype=np.uint8)
  file_io.write_npz(path, images=pixels, labels=np.arange(400) % 3)


def encode_config(folder, images: str) -> str:
  path = folder / "config.py"
  path.write_text(ENCODE.format(images=images, vae=FIXTURES / "tiny-sd2"))
  return f"--config={path}"


def of_two_processes(cache, *args: str) -> None:
  """Runs a command as two processes of four devices."""
  forked.finish(start(cache, *args))


def copy(source: str, target: str) -> None:
  storage.filesystem().copy(source, target, recursive=True)


def train_result(run: str):
  assert not half_saved(run)
  return jax.tree.map(np.asarray, restored(run)), losses(run)


def sample_result(run: str):
  assert not storage.exists(f"{run}/samples.parts")
  return array_io.read_npz(f"{run}/samples.npz")


def evaluate_result(run: str):
  rows = without_times(json.loads(file_io.read_text(f"{run}/evaluate/results.json")))
  assert not storage.glob(f"{run}/evaluate", "*.partial*")
  grids = storage.glob(f"{run}/evaluate", "*.png")
  return rows, [np.frombuffer(file_io.read_bytes(g), np.uint8) for g in grids]


def encode_result(run: str):
  paths = storage.glob(run, "latents-*")
  assert len(paths) == 10
  return [np.frombuffer(file_io.read_bytes(path), np.uint8) for path in paths]


@pytest.fixture(scope="module")
def teacher(bucket) -> str:
  run = f"{bucket}/kills/trained"
  job(*TEACHER, "--config.train.sample_every=0", f"--workdir={run}")
  return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample", "encode", "evaluate", "train"])
def test_a_killed_job_ends_like_one_that_was_not(
  name, bucket, cache, teacher, tmp_path
):
  folder = f"{bucket}/kills/{name}"
  write_images(f"{folder}/images.npz")
  few = ("--config.sample.num=400", "--config.sample.batch_size=8")
  measured = ("--config.evaluate.num=400", "--config.evaluate.batch_size=8")
  measured += ("--config.evaluate.samplers=('heun/8', 'ddim/4')",)
  measured += ("--config.evaluate.pr_num_images=100",)
  args, result = {
    "train": ((*TEACHER, *LONG), train_result),
    "sample": ((*TEACHER, "--job=sample", *few), sample_result),
    "encode": ((encode_config(tmp_path, f"{folder}/images.npz"),), encode_result),
    "evaluate": ((*TEACHER, "--job=evaluate", *measured), evaluate_result),
  }[name]

  def begin(run: str) -> forked.Process:
    if name in ("sample", "evaluate"):
      copy(teacher, run)
    return again(run)

  def again(run: str) -> forked.Process:
    env = environment(cache)
    return forked.start(*args, f"--workdir={run}", env=env, script=forked.SAVING_OFTEN)

  def finish(process: forked.Process) -> float:
    began = time.monotonic()
    said = process.wait(timeout=600)
    assert process.returncode == 0, said[-3000:]
    return time.monotonic() - began

  moments, num_kills = random.Random(name), 0
  finish(begin(f"{folder}/compiled"))
  seconds = finish(begin(f"{folder}/whole"))
  expected = result(f"{folder}/whole")
  for k in range(TIMES_KILLED):
    run = f"{folder}/killed{k}"
    process = begin(run)
    time.sleep(moments.uniform(0.3, 1.0) * seconds)
    process.kill()
    process.wait()
    num_kills += process.returncode == -9
    finish(again(run))
    assert_equal(result(run), expected)
    assert not storage.exists(f"{run}/.lock")
    print(f"{name}: {num_kills} of {k + 1} were killed; {seconds:.1f} s undisturbed")
  assert num_kills > TIMES_KILLED // 2


@pytest.mark.slow
def test_latents_are_read_from_a_bucket(bucket, tmp_path):
  images = f"{bucket}/latents/images.npz"
  write_images(images)
  config = encode_config(tmp_path, images)
  for run in (f"{bucket}/latents/run", str(tmp_path / "run")):
    job(config, f"--workdir={run}")
  there, here = (
    registry.build("data", {"name": "latents", "dir": run, "scale": "scm"})
    for run in (f"{bucket}/latents/run", str(tmp_path / "run"))
  )
  rows = np.array([0, 7, 399])
  assert_equal(there[rows], here[rows])
  assert there.digest() == there.digest() != here.digest()


@pytest.mark.slow
def test_two_processes_share_a_bucket(bucket, cache, tmp_path):
  args = (*TEACHER, "--config.mesh.fsdp=2", "--config.train.sample_every=0")
  run, here = f"{bucket}/two", str(tmp_path / "one")
  of_two_processes(cache, *args, f"--workdir={run}")
  job(*args, f"--workdir={here}")
  for a, b in zip(*map(jax.tree.leaves, map(restored, (run, here))), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)
  few = ("--config.sample.num=32", "--config.sample.batch_size=16", "--job=sample")
  of_two_processes(cache, *args, *few, f"--workdir={run}")
  assert array_io.npz_headers(f"{run}/samples.npz")["arr_0"].shape[0] == 32
