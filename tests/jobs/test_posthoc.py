"""Averages made from the checkpoints of a run."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from quick_xla import xla_flags

from sdiff_jax import config as configs
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import ema, train
from sdiff_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[2]


def config_of(*profiles: str):
  config = configs.base()
  config.model = configs.component("models", "mlp", width=16, depth=1)
  config.train.update(steps=48, batch_size=16, log_every=48)
  config.checkpoint.update(every=4, keep_every=4)
  config.ema.profiles = profiles
  return config


def weights(workdir: pathlib.Path):
  config = workdir_lib.read(str(workdir))
  return workdir_lib.trained(config, str(workdir))[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("ema") / "run"
  train.run(config_of("half_life/300", "power/0.05", "power/0.15"), str(workdir))
  return workdir


@pytest.mark.slow
def test_the_average_of_another_run_by_the_command_line(run, tmp_path):
  """One that differs from it in the profile alone, so has the same parameters."""
  other = tmp_path / "other"
  train.run(config_of("power/0.1"), str(other))
  file = tmp_path / "config.py"
  file.write_text("from sdiff_jax import config\nget_config = config.base\n")

  def call(*args):
    return subprocess.run(
      [sys.executable, "-m", "sdiff_jax.main", *args],
      cwd=ROOT,
      env=os.environ | {"XLA_FLAGS": xla_flags(1)},
      capture_output=True,
      text=True,
      check=False,
    )

  posthoc = (f"--config={file}", "--config.ema.posthoc_std=power/0.1", "--job=ema")
  done = call(f"--workdir={run}", *posthoc)
  made = run / "posthoc" / "0.1"
  wanted = f"averaged 12 checkpoints up to step 48: {made}\n"
  assert done.stdout == wanted, done.stderr
  assert "sum of 24 averages; relative error of the profile: 0." in done.stderr
  found, expected, start = weights(made), weights(other), weights(run)
  apart, moved = (
    jax.tree.map(lambda a, b: float(np.abs(a - b).max()), x, expected)
    for x in (found, start)
  )
  apart, moved = (max(jax.tree.leaves(x["net"])) for x in (apart, moved))
  assert moved > 1e-3
  assert apart < 0.01 * moved
  done = call(f"--workdir={made}", "--job=sample")
  assert done.stdout.startswith("made 64 images"), done.stderr
  assert (made / "training.json").exists()


@pytest.mark.slow
def test_mistakes(run):
  def refused(message, posthoc, **sample):
    config = config_of("power/0.05")
    config.ema.posthoc_std = posthoc
    config.sample.update(sample)
    with pytest.raises(UserError, match=message):
      ema.run(config, str(run))

  refused("config.ema.posthoc_std: '' is not of the form name/number", "")
  refused("must be power/sigma_rel, of a run with power", "half_life/3")
  refused(r"posthoc_std='power/0.5': .* must be in \(0, 0.28\)", "power/0.5")
  refused("has no checkpoint up to step 3", "power/0.1", checkpoint=3)
