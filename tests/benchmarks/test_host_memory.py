"""Weights go from shards to devices without a copy of the model on the host."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_at_most_a_shard_is_staged():
  """A GiB in four shards, in a process of its own."""
  command = [sys.executable, "benchmarks/host_memory.py", "--gigabytes=1"]
  found = subprocess.run(
    command,
    check=True,
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
  ).stdout
  values = dict(line.split(": ") for line in found.splitlines())
  assert float(values["arrays"]) == pytest.approx(4, rel=1e-3)  # in shards
  assert float(values["staged"]) < 1.2
  assert float(values["peak_less_arrays"]) < 1.2
