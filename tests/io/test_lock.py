"""Locks on directories: held by one process, and by none that is dead."""

import os
import socket
import subprocess
import sys

import pytest

from sdiff_jax.io import lock
from sdiff_jax.types import UserError

HOLD = """
import sys, time
from sdiff_jax.io import lock
with lock.locked(sys.argv[1], "train"):
  print("locked", flush=True)
  time.sleep(100)
"""


def test_the_second_is_refused_in_one_line_until_the_first_is_dead(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "locked\n"
  with pytest.raises(UserError) as caught, lock.locked(str(tmp_path), "sample"):
    pass
  assert str(caught.value) == (
    f"{tmp_path} is in use by --job=train (pid {process.pid} on {socket.gethostname()}); "
    "wait until it has ended, or use another --workdir"
  )
  process.kill()
  process.communicate()
  assert (tmp_path / ".lock").exists()  # a dead process removes nothing
  with lock.locked(str(tmp_path), "sample"):
    assert f'"pid": {os.getpid()}' in (tmp_path / ".lock").read_text()
  assert not list(tmp_path.iterdir())


def test_a_directory_that_stays_empty_is_removed(tmp_path):
  folder = tmp_path / "a" / "b"
  with pytest.raises(UserError, match="a mistake"), lock.locked(str(folder), "train"):  # noqa: PT012
    assert folder.exists()
    raise UserError("a mistake")
  assert not list(tmp_path.iterdir())
  with lock.locked(str(folder), "train"):
    (folder / "file").touch()
  assert [p.name for p in folder.iterdir()] == ["file"]


def test_one_process_does_not_lock_twice(tmp_path):
  with lock.locked(str(tmp_path), "study"), pytest.raises(UserError, match="study"):
    with lock.locked(str(tmp_path), "study"):
      pass
