"""launch/slurm.sh against stand-ins for srun and scontrol."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = {
  "srun": """echo "$SRUN_CPUS_PER_TASK" "$@" >"$SLURM_SUBMIT_DIR/steps"
  while [[ $1 == --* ]]; do shift; done; exec "$@\"""",
  "scontrol": 'echo "$@" >>$SLURM_SUBMIT_DIR/requeued',
  "job": """trap 'kill $!; exit 0' TERM
  cd "$SLURM_SUBMIT_DIR"; source ./job; echo "$@" >ran; sleep 60 & wait""",
}


@pytest.fixture
def submit(tmp_path):
  """Starts slurm.sh as Slurm would, from a copy elsewhere; the job does `text`."""
  (tmp_path / "launch").symlink_to(ROOT / "launch")
  for name, text in TOOLS.items():
    tool = tmp_path / "bin" / name
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f"#!/usr/bin/env bash\n{text}\n")
    tool.chmod(0o755)
  copy = tmp_path / "spool"
  copy.write_text((ROOT / "launch" / "slurm.sh").read_text())
  found = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
  found |= {"SLURM_SUBMIT_DIR": str(tmp_path), "PYTHON": str(tmp_path / "bin" / "job")}

  def start(text: str) -> subprocess.Popen:
    (tmp_path / "job").write_text(text)
    return subprocess.Popen(["bash", str(copy), "--config=x"], env=os.environ | found)

  return start


def until(path: pathlib.Path, process: subprocess.Popen) -> None:
  deadline = time.monotonic() + 30
  while not path.exists():
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_the_job_runs_with_its_arguments_and_code(submit, tmp_path):
  assert submit('echo "$@" "$JAX_PLATFORMS" >ran; exit 3').wait(30) == 3
  assert (tmp_path / "ran").read_text() == "-m sdiff_jax.main --config=x cpu\n"
  assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("image", ["", "sdiff.sqsh"])
def test_tasks_get_their_cores_labels_and_container(
  submit, tmp_path, monkeypatch, image
):
  monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
  monkeypatch.setenv("SDIFF_IMAGE", image)
  assert submit("exit 0").wait(30) == 0
  cores, *options = (tmp_path / "steps").read_text().split()
  assert cores == "12"  # srun does not take it over from sbatch since 22.05
  assert "--label" in options
  inside = [option for option in options if option.startswith("--container")]
  mounts = [f"--container-mounts={tmp_path}:{tmp_path}"]
  mounts += [f"--container-workdir={tmp_path}"]
  assert inside == ([f"--container-image={image}", *mounts] if image else [])


@pytest.mark.parametrize(
  ("number", "requeued"),
  [(signal.SIGUSR1, True), (signal.SIGTERM, False)],
  ids=["time is nearly up", "cancelled"],
)
def test_the_job_saves_and_is_queued_again_when_time_is_up(
  submit, tmp_path, number, requeued
):
  process = submit("true")
  until(tmp_path / "ran", process)
  process.send_signal(number)
  assert process.wait(30) == 75
  assert (tmp_path / "requeued").exists() == requeued


def test_a_run_that_fails_when_time_is_up_is_not_queued_again(submit, tmp_path):
  process = submit("trap 'exit 2' TERM")
  until(tmp_path / "ran", process)
  process.send_signal(signal.SIGUSR1)
  assert process.wait(30) == 2
  assert not (tmp_path / "requeued").exists()
