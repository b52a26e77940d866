"""The command line in other processes, and a run that takes seconds."""

import os
import pathlib
import subprocess
import sys

from quick_xla import xla_flags

from sdiff_jax.experiment import build, training
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.training import state

ROOT = pathlib.Path(__file__).parents[1]
# Small enough to take seconds, with every part of the road in it.
TINY = (
  "--config.model.width=16",
  "--config.model.depth=1",
  "--config.train.steps=12",
  "--config.train.batch_size=16",
  "--config.train.log_every=4",
  "--config.train.sample_every=6",
  "--config.checkpoint.every=4",
)


def command(*args: str) -> list[str]:
  return [sys.executable, "-m", "sdiff_jax.main", *args]


def environment(cache, devices: int = 1) -> dict[str, str]:
  return os.environ | {
    "XLA_FLAGS": xla_flags(devices),
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "PYTHONWARNINGS": "ignore",
  }


def call(cache, *args: str, devices: int = 1) -> subprocess.CompletedProcess:
  return subprocess.run(
    command(*args),
    cwd=ROOT,
    env=environment(cache, devices),
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def works(*args, **options) -> str:
  """Runs a command that must succeed, and returns its last line."""
  done = call(*args, **options)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout.strip().splitlines()[-1]


def weights(workdir: pathlib.Path) -> state.TrainState:
  """Returns the newest state of a run."""
  config = workdir_lib.read(str(workdir))
  built = build.build(config)
  trainer = training.build_trainer(config, built.network, built.network, built.mesh)
  with checkpoints_lib.Checkpoints(str(workdir)) as checkpoints:
    return checkpoints.restore(trainer.abstract_state())
