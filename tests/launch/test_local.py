"""launch/local.sh trains for real: two processes, SIGTERM, then one process resumes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = (
  "--config=configs/digits_diffusion.py",
  "--config.model.width=16",
  "--config.model.depth=1",
  "--config.train.steps=24",
  "--config.train.batch_size=16",
  "--config.train.log_every=1",
  "--config.train.sample_every=0",
  "--config.checkpoint.every=2",
)


def local(*args: str, **environment: str) -> subprocess.Popen:
  kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  return subprocess.Popen(
    ["bash", str(ROOT / "launch" / "local.sh"), *args],
    env=kept | {"PYTHON": sys.executable, "PYTHONWARNINGS": "ignore"} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_both_modes_train_and_each_goes_on_with_the_other(tmp_path):
  run = tmp_path / "run"
  config = (*CONFIG, f"--workdir={run}")
  cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
  pair = local("--processes=2", *config, **cache)
  deadline = time.monotonic() + 200
  while not list(run.glob("checkpoints/[0-9]*")):
    assert pair.poll() is None, pair.communicate()[1][-3000:]
    assert time.monotonic() < deadline
    time.sleep(0.02)
  pair.send_signal(signal.SIGTERM)
  said, errors = pair.communicate(timeout=120)
  assert pair.returncode == 75, errors[-3000:]
  step = max(int(path.name) for path in run.glob("checkpoints/[0-9]*"))
  assert 0 < step < 24
  assert f"stopped at step {step}; repeat the command to resume: {run}" in said
  one = local(*config, **cache)
  said, errors = one.communicate(timeout=200)
  assert one.returncode == 0, errors[-3000:]
  assert said.splitlines()[-1] == f"trained 24 steps: {run}"
  with (run / "metrics.jsonl").open() as lines:
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 25))


def test_other_jobs_and_their_mistakes_pass_through(tmp_path):
  done = local("--job=report", f"--workdir={tmp_path}")
  _, errors = done.communicate(timeout=60)
  assert done.returncode == 2
  assert errors.splitlines()[-1].startswith("error: ")


def test_each_process_has_its_share_of_the_devices(tmp_path):
  stub = tmp_path / "python"
  show = "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $XLA_FLAGS $JAX_PLATFORMS $*"
  stub.write_text(f'#!/usr/bin/env bash\necho "{show}"; exit $((JAX_PROCESS_ID * 5))\n')
  stub.chmod(0o755)
  done = local("--processes=4", "--a=(1, 2)", PYTHON=str(stub), XLA_FLAGS="--mine")
  said, _ = done.communicate(timeout=60)
  flags = "--mine --xla_force_host_platform_device_count=2"
  assert sorted(said.splitlines()) == [
    f"{i}/4 {flags} cpu -m sdiff_jax.main --a=(1, 2)" for i in range(4)
  ]
  assert done.returncode == 5


def test_sigterm_reaches_one_process_and_the_code_says_so(tmp_path):
  stub = tmp_path / "python"
  stub.write_text(
    f"#!/usr/bin/env bash\ntrap 'sleep 0.5; touch {tmp_path}/saved; exit 0' TERM\n"
    "echo ready\nwhile true; do sleep 0.05; done\n"
  )
  stub.chmod(0o755)
  process = local("--job=train", PYTHON=str(stub))
  assert process.stdout.readline() == "ready\n"
  for _ in range(3):  # once, or as often as someone is impatient
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
  assert process.wait(timeout=60) == 75
  assert (tmp_path / "saved").exists()  # it waited for the process to end
  process.communicate()
