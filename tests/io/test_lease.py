"""Locks in a bucket: held by a process that lives."""

import os
import subprocess
import sys
import threading
import time

import pytest

from sdiff_jax.io import lease, lock, storage
from sdiff_jax.types import UserError

HOLD = """
import sys, time
from sdiff_jax.io import lock
with lock.locked(sys.argv[1], "train"):
  print("locked", flush=True)
  time.sleep(100)
"""


@pytest.fixture
def folder(bucket, tmp_path) -> str:
  return f"{bucket}/{tmp_path.name}"


@pytest.fixture
def fast(monkeypatch):
  monkeypatch.setattr(lease, "RENEWAL", 0.05)
  monkeypatch.setattr(lease, "POLL", 0.02)
  monkeypatch.setattr(lease, "LEASE", 1.0)


@pytest.fixture
def conditional(bucket, monkeypatch):
  """Makes the emulator refuse what Google refuses: writes on another generation."""
  fs, mutex = storage.filesystem(), threading.Lock()
  plain = fs.call

  def call(method, url, *args, ifGenerationMatch=None, **options):
    name = args[1] if args else options["name"]
    bucket = args[0] if args else url.split("/")[-2]
    with mutex:
      try:
        generation = fs.info(f"{bucket}/{name}")["generation"]
      except FileNotFoundError:
        generation = "0"
      if ifGenerationMatch not in (None, generation):
        raise FileExistsError(name)
      return plain(method, url, *args, **options)

  monkeypatch.setattr(fs, "call", call)


def test_the_lock_of_a_process_that_was_killed_is_free_at_once(folder):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "locked\n"
  process.kill()
  process.communicate()
  assert storage.exists(f"{folder}/.lock")  # a dead process removes nothing
  start = time.monotonic()
  with lock.locked(folder, "sample"):
    assert f'"pid": {os.getpid()}'.encode() in storage.filesystem().cat_file(
      f"{folder}/.lock"
    )
  assert time.monotonic() - start < lease.LEASE / 2
  assert not storage.exists(f"{folder}/.lock")


def test_the_second_is_refused_when_the_first_renews(folder, fast, monkeypatch):
  with lock.locked(folder, "train"):
    # To the second process the first is one of another machine.
    monkeypatch.setattr(lease, "_machine", lambda: "another")
    with pytest.raises(UserError, match=f"{folder} is in use by --job=train .pid"):
      with lock.locked(folder, "sample"):
        pass


def test_a_machine_that_shows_no_life_has_lost_the_lock(folder, fast, monkeypatch):
  holder = lease.Holder(pid=1, host="away", machine="another", job="train")
  lease._write(f"{folder}/.lock", holder, 0)
  start = time.monotonic()
  with lock.locked(folder, "sample"):
    assert time.monotonic() - start > lease.LEASE


def test_content_that_is_damaged_is_another_process(folder, fast):
  storage.filesystem().pipe_file(f"{folder}/.lock", b"{")
  with lock.locked(folder, "sample"):
    pass


def test_of_many_one_has_the_lock(folder, conditional, fast, monkeypatch):
  """Eight threads add to a number that a lock alone protects."""
  monkeypatch.setattr(lease, "RENEWAL", 100.0)
  held, most, took = 0, 0, 0

  def work() -> None:
    nonlocal held, most, took
    try:
      with lease.Lease(f"{folder}/.lock", "train"):
        held += 1
        most = max(most, held)
        time.sleep(0.01)
        held -= 1
        took += 1
    except UserError:
      pass

  # None of them is dead for the others.
  monkeypatch.setattr(lease, "_is_dead", lambda holder: False)
  threads = [threading.Thread(target=work) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert most == 1
  assert took >= 1


def test_who_was_taken_over_ends(folder, conditional, fast, monkeypatch, capsys):
  ended = threading.Event()
  monkeypatch.setattr(os, "_exit", lambda code: ended.set())
  holder = lease.Holder(pid=1, host="away", machine="another", job="sample")
  with lock.locked(folder, "train"):
    generation, _ = lease._read(f"{folder}/.lock")
    while True:  # the holder may renew in between
      try:
        lease._write(f"{folder}/.lock", holder, generation)
        break
      except FileExistsError:
        generation, _ = lease._read(f"{folder}/.lock")
    assert ended.wait(10)
  assert "another process has taken over; this one ends" in capsys.readouterr().err
  assert lease._read(f"{folder}/.lock")[1]["job"] == "sample"  # theirs stays
