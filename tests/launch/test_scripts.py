"""The scripts of launch/ as text: shellcheck, and the files that they read."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
ENVIRONMENTS = sorted((ROOT / "launch" / "env").glob("*.env"))


def test_shellcheck_and_bash_find_nothing():
  folders = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
  shellcheck = shutil.which("shellcheck", path=folders)
  ours = [*SCRIPTS, *ENVIRONMENTS, ROOT / "tests" / "launch" / "google.sh"]
  for command in ([shellcheck, "--external-sources"], ["bash", "-n"]):
    done = subprocess.run(
      [*command, *map(str, ours)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_error(script):
  if script.name == "common.sh":  # read by the others
    assert not os.access(script, os.X_OK)
    return
  assert os.access(script, os.X_OK)
  assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("file", ENVIRONMENTS, ids=lambda path: path.name)
def test_what_is_set_already_stays(file):
  names = re.findall(r"^export (\w+)=", file.read_text(), re.MULTILINE)
  assert names
  show = f"set -eu; source {file}; env"

  def variables(found):
    said = subprocess.check_output(
      ["bash", "-c", show], env={"PATH": os.environ["PATH"]} | found, text=True
    )
    return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)

  assert set(names) <= set(variables({}))
  mine = dict.fromkeys(names, "mine")
  assert mine.items() <= variables(mine).items()


def test_jaxlib_knows_the_flags_of_gpus():
  show = (
    f"source {ROOT}/launch/env/gpu.env; JAX_PLATFORMS=cpu exec {sys.executable} -c "
  )
  code = "import jax; jax.devices()"
  for more, known in (("", True), ("XLA_FLAGS='--xla_gpu_no_such_flag=1'; ", False)):
    command = f"{more}{show}'{code}'"
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
      ["bash", "-c", command], env=environment, capture_output=True, check=False
    )
    assert (done.returncode == 0) == known, done.stderr


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("job.sh",), "give cpu, gpu or tpu, then the job's arguments"),
    (("job.sh", "quantum"), "give cpu, gpu or tpu, then the job's arguments"),
    (("local.sh", "--processes=3"), "--processes=3: take 1, 2, 4 or 8"),
    (
      ("slurm.sh",),
      "submit from the root of the checkout: sbatch launch/slurm.sh --co",
    ),
    (("worker.sh",), "give setup, start, follow, code, made or stop"),
  ],
)
def test_mistakes_are_one_line_and_code_2(tmp_path, args, message):
  done = subprocess.run(
    ["bash", str(ROOT / "launch" / args[0]), *args[1:]],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr.startswith(f"error: {message}")
  assert len(done.stderr.splitlines()) == 1


def test_the_readme_names_what_is_there():
  text = (ROOT / "launch" / "README.md").read_text()
  names = set(re.findall(r"(?:launch|configs)/[a-z_/]+\.[a-z]+", text))
  assert len(names) >= 9
  assert all((ROOT / name).exists() for name in names), names
