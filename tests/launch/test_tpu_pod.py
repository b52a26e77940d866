"""launch/tpu_pod.sh against a stand-in for Google, two hosts and the job."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
POD = ("--zone=z", "--type=v5p-16", "--bucket=gs://b/")
JOB = ("--", "--config=configs/x.py", "--config.sampler.timesteps=(1.5, 1.1)", "it's")
# The tools of the hosts. What the job does is in $GOOGLE/job.
TOOLS = {
  "uv": """echo "$@" >>$GOOGLE/installed
  [[ $* != *--requirement* || ! -f $GOOGLE/flaky ]] || { rm $GOOGLE/flaky; exit 1; }
  [[ $1 == venv ]] || exit 0
  mkdir -p .venv/bin
  cp $GOOGLE/bin/job .venv/bin/python""",
  "sudo": "cat >>$GOOGLE/root",
  "gcsfuse": """echo "$@" >>$GOOGLE/mounts
  rm -rf "${@: -1}"
  ln -s $GOOGLE/bucket "${@: -1}\"""",
  "job": """[[ $1 != -c ]] || exit 0
  echo "host $HOST: $JAX_PLATFORMS, $JAX_COMPILATION_CACHE_DIR"
  printf '<%s>' "$@" && echo
  echo $HOST >>$GOOGLE/started
  source $GOOGLE/job""",
}


class Google:
  """A folder that stands for a project, and the script run against it."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.write("granted", "ACTIVE\n")
    (folder / "bin").mkdir()
    (folder / "bucket").mkdir()
    shutil.copy(HERE / "google.sh", folder / "bin" / "gcloud")
    for name, text in TOOLS.items():
      self.write(f"bin/{name}", f"#!/usr/bin/env bash\nset -euo pipefail\n{text}\n")
    for tool in (folder / "bin").iterdir():
      tool.chmod(0o755)
    shutil.copytree(ROOT / "launch", folder / "tree" / "launch")

  def write(self, name: str, text: str) -> None:
    (self.folder / name).write_text(text)

  def lines(self, name: str) -> list[str]:
    path = self.folder / name
    return path.read_text().splitlines() if path.exists() else []

  def verbs(self) -> str:
    """Returns which commands of gcloud were called, in order."""
    return " ".join(line.split()[3] for line in self.lines("calls"))

  def start(self, *args: str) -> subprocess.Popen:
    kept = {"GOOGLE": str(self.folder), "SDIFF_POLL": "0.1"}
    kept |= {"TMPDIR": str(self.folder), "HOME": str(self.folder)}
    unset = ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "PYTHON")
    found = {k: v for k, v in os.environ.items() if k not in unset}
    return subprocess.Popen(
      ["bash", str(self.folder / "tree" / "launch" / "tpu_pod.sh"), *args],
      env=found | kept | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}"},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def call(self, *args: str, code: int = 0) -> tuple[str, str]:
    process = self.start(*args)
    said = process.communicate(timeout=60)
    assert process.returncode == code, "\n".join(said)
    return said


@pytest.fixture
def google(tmp_path) -> Google:
  return Google(tmp_path)


def test_a_dry_run_prints_every_command_and_runs_none(google):
  said, _ = google.call("all", *POD, "--spot", "--project=p", "--dry-run", *JOB)
  wanted = (HERE / "dry_run.txt").read_text()
  assert said.replace(str(google.folder), "/tmp") == wanted
  assert not google.lines("calls")


def test_a_dry_run_from_git_quotes_for_both_shells(google):
  said, _ = google.call(
    "setup",
    "--zone=z",
    "--bucket=b",
    "--git=https://h/r.git",
    "--ref=it's",
    "--dry-run",
  )
  (line,) = said.splitlines()
  words = subprocess.check_output(["bash", "-c", f"printf '%s\\n' {line}"], text=True)
  (command,) = (w for w in words.splitlines() if w.startswith("--command="))
  assert "git fetch --quiet --depth=1 https://h/r.git 'it'\\''s' && " in command
  assert command.endswith("&& bash launch/worker.sh setup b")


def test_from_nothing_to_a_finished_run(google):
  google.write("granted", "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
  google.write("job", "sleep 0.3; echo done > runs/$HOST; echo trained")
  said, progress = google.call("all", *POD, *JOB)
  assert google.verbs() == (
    "describe create describe describe describe scp ssh ssh ssh ssh ssh delete"
  )
  assert "sdiff: WAITING_FOR_RESOURCES, 0 of 1440 minutes" in progress
  cache = google.folder / "host0" / "sdiff_jax" / "runs" / ".xla"
  assert f"host 0: tpu,cpu, {cache}" in said
  assert "host 1" not in said  # one host speaks
  job = "<-m><sdiff_jax.main><--config=configs/x.py>"
  assert f"{job}<--config.sampler.timesteps=(1.5, 1.1)><it's>\ntrained\n" in said
  assert google.lines("started") == ["0", "1"]
  made = sorted(p.name for p in (google.folder / "bucket").iterdir())
  assert made == [".logs", "0", "1"]
  assert google.lines("mounts")[0].startswith("--implicit-dirs --metadata-cache-ttl-s")


def test_a_preempted_pod_is_created_again_and_the_job_goes_on(google):
  preempted = (
    "sleep 0.5; echo SUSPENDING > $GOOGLE/state; kill -TERM $PPID; sleep 60 & wait"
  )
  google.write(
    "job", f"trap 'kill $!; exit 0' TERM; mkdir $GOOGLE/x || exit 0; {preempted}"
  )
  _, progress = google.call("all", *POD, "--spot", *JOB)
  assert "lost, restart 1 of 100" in progress
  assert google.verbs().split().count("create") == 2
  assert google.verbs().endswith("delete")
  assert sorted(google.lines("started")) == ["0", "0", "1", "1"]


@pytest.mark.slow
def test_hosts_that_die_with_the_pod_are_no_failure_of_the_job(google):
  google.write(
    "job", "mkdir $GOOGLE/$HOST || exit 0; echo FAILED > $GOOGLE/state; exit 1"
  )
  google.call("all", *POD, *JOB)
  assert google.verbs().split().count("create") == 2
  google.write("job", "echo SUSPENDED > $GOOGLE/state; exit 1")
  google.call("all", *POD, "--restarts=1", *JOB, code=1)
  assert google.verbs().split().count("create") == 4


def test_a_job_that_fails_gives_its_code_and_shows_the_logs_of_all(google):
  google.write("job", "echo trouble on $HOST; exit $((3 * HOST))")
  _, progress = google.call("all", *POD, *JOB, code=3)
  assert "trouble on 0" in progress
  assert "trouble on 1" in progress
  assert google.verbs().endswith("delete")
  google.call("all", *POD, "--keep", *JOB, code=3)
  assert not google.verbs().endswith("delete")


@pytest.mark.slow
def test_a_job_that_fails_after_a_checkpoint_goes_on(google):
  google.write(
    "job",
    """mkdir -p runs/x_S_tiny/checkpoints/$(wc -l <$GOOGLE/started)
    sleep 0.3
    exit $(($(wc -l <$GOOGLE/started) < 6 ? 1 : 0))""",
  )
  job = ("--", "--config=configs/x.py:S,tiny")
  _, progress = google.call("all", *POD, *job)
  assert "failed with code 1, restart 2 of 100" in progress
  assert google.verbs().split().count("create") == 1  # the pod was well
  google.write("started", "")
  google.write("job", "exit 1")  # of which the bucket holds checkpoints, but no new one
  _, progress = google.call("all", *POD, *job, code=1)
  assert "restart" not in progress


def test_a_mistake_is_not_repeated(google):
  google.write("job", "mkdir -p runs/x/checkpoints/$RANDOM; exit $((HOST ? 134 : 2))")
  google.call("all", *POD, *JOB, code=2)
  assert google.lines("started") == ["0", "1"]


def test_logs_of_all_hosts_stay_in_the_bucket(google):
  google.write("job", "echo of host $HOST; sleep 0.3")
  google.call("all", *POD, *JOB)
  logs = [p.read_text() for p in (google.folder / "bucket" / ".logs").iterdir()]
  assert logs  # the stand-ins share a name, which real hosts do not
  assert all("of host" in log for log in logs)


def test_the_data_are_not_sent(google):
  tree = google.folder / "tree"
  for name in ("data/imagenet/x.jpg", "sdiff_jax/data/npz.py", ".venv/y", "runs/z"):
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text("")
  for command in ("create", "setup"):
    google.call(command, *POD)
  host = google.folder / "host0" / "sdiff_jax"
  assert (host / "sdiff_jax" / "data" / "npz.py").exists()
  assert not (host / "data").exists()


def test_hosts_install_the_lock_and_try_again(google):
  google.write("flaky", "")
  for command in ("create", "setup"):
    google.call(command, *POD)
  locked = [x for x in google.lines("installed") if "launch/lock/tpu.txt" in x]
  assert len(locked) == 3  # two hosts, of which one failed once
  assert google.lines("root") == ["always", "always"]  # transparent huge pages


def test_several_slices_are_one_job(google):
  google.write("job", "echo trained")
  google.call("all", *POD, "--slices=2", *JOB)
  create, scp, start, code = (
    [line for line in google.lines("calls") if word in line]
    for word in (" create ", " scp ", "worker.sh start", "worker.sh code")
  )
  assert "--node-count=2 --node-prefix=sdiff " in create[0]
  assert "--node-id" not in create[0]
  for lines in (scp, start, code):
    assert [
      line.split()[4].partition(":")[0] for line in lines if "tgz" not in line
    ] in (
      [],
      ["sdiff-0", "sdiff-1"],
    )
  assert len(scp) == 2


def test_a_broken_connection_does_not_end_the_job(google):
  google.write(
    "job", "touch $GOOGLE/broken; while [[ -f $GOOGLE/broken ]]; do sleep 0.1; done"
  )
  for command in ("create", "setup"):
    google.call(command, *POD)
  _, progress = google.call("run", "--zone=z", *JOB)
  assert "no connection, trying again" in progress
  assert google.lines("started") == ["0", "1"]


def test_stop_ends_the_job_and_all_counts_it_as_done(google):
  google.write(
    "job",
    "trap 'kill $!; echo saved; exit 0' TERM; touch $GOOGLE/ready; sleep 60 & wait",
  )
  running = google.start("all", *POD, *JOB)
  while len(google.lines("started")) < 2 or not (google.folder / "ready").exists():
    assert running.poll() is None, running.communicate()
  google.call("stop", "--zone=z")
  said, _ = running.communicate(timeout=60)
  assert running.returncode == 0
  assert "saved" in said
  assert google.verbs().endswith("delete")


def test_a_pod_that_does_not_come_is_withdrawn(google):
  google.write("granted", "WAITING_FOR_RESOURCES\n")
  _, said = google.call("create", *POD, "--wait=0", code=2)
  assert said.splitlines()[-1].startswith("error: no pod in 0 hours")
  assert google.verbs() == "describe create describe delete"


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("fly",), "unknown command fly"),
    (("all", "--spto"), "unknown option --spto"),
    (("delete",), "--zone is missing"),
    (("create", "--zone=z"), "--type is missing"),
    (("create", "--zone=z", "--type=v99-8"), "--type=v99-8: unknown"),
    (
      ("create", "--zone=z", "--type=tpu7x-128"),
      "--type=tpu7x-128: the Cloud TPU API does not have it; use GKE",
    ),
    (("create", *POD, "--slices=0"), "--slices=0: must be at least 1"),
    (("setup", "--zone=z"), "--bucket is missing"),
    (("all", *POD), "the job's arguments are missing"),
    (("create", *POD, "--wait=long"), "--wait, --restarts and --slices take whole"),
  ],
)
def test_mistakes_are_one_line_and_code_2(google, args, message):
  _, said = google.call(*args, code=2)
  assert said.startswith(f"error: {message}")
  assert len(said.splitlines()) == 1
  assert not google.lines("calls")


def test_gcloud_is_asked_for(google):
  (google.folder / "bin" / "gcloud").unlink()
  google.write(
    "tree/launch/common.sh", "PATH=\n" + (ROOT / "launch/common.sh").read_text()
  )
  _, said = google.call("delete", "--zone=z", code=2)
  assert said.startswith("error: gcloud is missing")


def test_help_names_every_option(google):
  said, _ = google.call("--help")
  script = (ROOT / "launch" / "tpu_pod.sh").read_text()
  options = set(re.findall(r"^    (--[a-z-]+)(?:=\*)?\)", script, re.MULTILINE))
  assert {"--zone", "--spot", "--worker"} < options
  assert all(option in said for option in options)
