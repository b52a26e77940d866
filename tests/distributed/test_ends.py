"""A job of two processes ends whole, however long process 0 works alone."""

import shutil

import forked
import jax
import numpy as np
import pytest
from command_line import works
from several_processes import start
from test_processes import CONFIG

from sdiff_jax.data import npz
from sdiff_jax.distributed import processes

# A command line whose process 0 takes ten seconds longer than the others, which is longer
# than it may be silent; samples of more than 100 bytes stay in their parts.
SLOW_END = """
import sys, time, jax
from sdiff_jax import main
from sdiff_jax.distributed import processes, signals
from sdiff_jax.jobs import sample
signals.install()
processes.HEARTBEAT = 5
sample.MAX_GATHERED = int(sys.argv.pop(1))
for name in ("_finish", "_finish_in_parts"):
  def slowly(*args, finish=getattr(sample, name)):
    time.sleep(10)
    return finish(*args)
  if hasattr(sample, name):
    setattr(sample, name, slowly)
main._program()
"""


def test_the_end_is_waited_for_longer_than_a_heartbeat(monkeypatch):
  asked = {}
  monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: asked.update(kw))
  processes._initialize(None, 300)
  assert asked["heartbeat_timeout_seconds"] < 60  # then a dead process is noticed
  assert asked["shutdown_timeout_seconds"] >= 3600


@pytest.fixture(scope="module")
def teacher(cache, tmp_path_factory):
  folder = tmp_path_factory.mktemp("ends") / "teacher"
  works(cache, *CONFIG, f"--workdir={folder}", "--config.train.steps=2")
  return folder


def sampled(cache, most: int, *args: str) -> str:
  return forked.finish(start(cache, str(most), *args, script=SLOW_END))


@pytest.mark.slow
def test_images_of_a_large_job_stay_where_they_were_made(cache, teacher):
  args = (f"--workdir={teacher}", "--job=sample")
  said = sampled(cache, 100, *args)
  assert f"{teacher}/samples.parts" in said
  assert not (teacher / "samples.npz").exists()
  parts = npz.build(path=str(teacher / "samples.parts"))
  stored = parts[np.arange(64)][0]
  evaluate = [
    f"--workdir={teacher}",
    "--job=evaluate",
    "--config=configs/digits_diffusion.py",
  ]
  evaluate += ["--config.evaluate.pr_num_images=0"]
  works(cache, *evaluate, f"--config.evaluate.images={teacher}/samples.parts")
  sharded = (teacher / "evaluate" / "images.json").read_bytes()
  np.savez(teacher / "samples.parts.npz", arr_0=stored)
  works(cache, *evaluate, f"--config.evaluate.images={teacher}/samples.parts.npz")
  whole = (teacher / "evaluate" / "images.json").read_bytes()
  assert whole == sharded.replace(b"samples.parts", b"samples.parts.npz")


@pytest.mark.slow
def test_process_0_may_gather_and_write_for_long(cache, teacher):
  shutil.rmtree(teacher / "samples.parts", ignore_errors=True)
  args = (
    f"--workdir={teacher}",
    "--job=sample",
    "--config=configs/digits_diffusion.py",
  )
  said = sampled(cache, 2**30, *args, "--config.sample.seed=1")
  assert f"{teacher}/samples.npz" in said
