"""Locks in a bucket, which has no locks of the kernel: objects that their holder renews.

The holder writes its object again every RENEWAL seconds, and so gives it a new
generation. Who finds an object waits: a holder that shows no sign of life for LEASE
seconds of this machine's own clock is dead, and so is a process of this machine that has
ended. Objects are created, renewed and removed on the condition that the generation is
the known one, which Google Cloud Storage checks: of two processes one succeeds. (An
emulator that ignores the condition gives the lock to both of two processes that start at
the same moment.)
"""

import contextlib
import json
import os
import sys
import threading
import time
from typing import TypedDict

from sdiff_jax.io import records, storage
from sdiff_jax.types import Json, UserError

LEASE = 60.0  # s
RENEWAL = 15.0  # s
POLL = 1.0  # s
MAX_BYTES = 1000  # of the object


class Holder(TypedDict):
  """Content of the object.

  Attributes:
    pid: number of the process.
    host: name of its machine.
    machine: what tells its machine, and its container, from all others.
    job: what it does.
  """

  pid: int
  host: str
  machine: str
  job: str


class Lease:
  """A lock in a bucket, as a context manager.

  Example:
    >>> Lease("gs://bucket/run/.lock", "train").path
    'gs://bucket/run/.lock'
  """

  def __init__(self, path: str, job: str):
    """Stores who asks; nothing is locked before the context is entered.

    Args:
      path: of the object.
      job: what holds the lock, for the message that others get.
    """
    self.path = path
    host = os.uname().nodename
    self._holder = Holder(pid=os.getpid(), host=host, machine=_machine(), job=job)
    self._generation = 0
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")

  def __enter__(self) -> "Lease":
    """Takes the lock.

    Raises:
      UserError: another process holds it.
    """
    seen, deadline = 0, 0.0
    while True:
      found = _read(self.path)
      if found is None:
        with contextlib.suppress(FileExistsError):  # another process was faster
          self._generation = _write(self.path, self._holder, 0)
          break
        continue
      generation, holder = found
      if _is_dead(holder) or (generation == seen and time.monotonic() > deadline):
        _remove(self.path, generation)
      elif not seen:
        seen, deadline = generation, time.monotonic() + LEASE
        print(
          f"{self.path}: waiting up to {LEASE:.0f} s for a sign of life of "
          f"{_describe(holder)}",
          file=sys.stderr,
        )
      elif generation != seen:
        raise UserError(
          f"{os.path.dirname(self.path)} is in use by {_describe(holder)}; wait until it "
          "has ended, or use another --workdir"
        )
      else:
        time.sleep(POLL)
    self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._done.set()
    self._thread.join()
    _remove(self.path, self._generation)

  def _keep(self) -> None:
    """Renews the lock; ends this process if another one has taken it."""
    while not self._done.wait(RENEWAL):
      try:
        self._generation = _write(self.path, self._holder, self._generation)
      except (FileExistsError, FileNotFoundError):
        reason = f"{self.path}: another process has taken over; this one ends"
        print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(1)
      except Exception as error:  # of the network: the next attempt may succeed
        print(f"{self.path} was not renewed: {error}", file=sys.stderr)


def _machine() -> str:
  """Returns what tells this machine, and this container, from all others."""
  try:
    with open("/proc/sys/kernel/random/boot_id") as file:
      return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _is_dead(holder: Holder | None) -> bool:
  """Returns whether a holder was a process of this machine that has ended."""
  if holder is None or not holder["machine"] or holder["machine"] != _machine():
    return False
  if holder["pid"] == os.getpid():
    return True
  try:
    os.kill(holder["pid"], 0)
  except ProcessLookupError:
    return True
  except OSError:  # it runs under another user
    return False
  return False


def _describe(holder: Holder | None) -> str:
  if holder is None:
    return "another process"
  return f"--job={holder['job']} (pid {holder['pid']} on {holder['host']})"


def _read(path: str) -> tuple[int, Holder | None] | None:
  """Returns generation and content of an object, None if there is none."""
  fs, name = storage.filesystem(), path.removeprefix(storage.BUCKET)
  try:
    generation = int(fs.info(name)["generation"])
    content = fs.cat_file(name)
  except FileNotFoundError:
    return None
  try:
    return generation, records.decode(content[:MAX_BYTES], Holder, path)
  except UserError:
    return generation, None


def _write(path: str, holder: Holder, generation: int) -> int:
  """Writes an object if it has a generation, 0 for none; returns its new generation.

  Raises:
    FileExistsError: it has another one.
  """
  fs = storage.filesystem()
  bucket, _, name = path.removeprefix(storage.BUCKET).partition("/")
  answer: dict[str, Json] = fs.call(
    "POST",
    f"{fs._location}/upload/storage/v1/b/{bucket}/o",
    uploadType="media",
    name=name,
    ifGenerationMatch=str(generation),
    headers={"Content-Type": "application/octet-stream"},
    data=json.dumps(holder).encode(),
    json_out=True,
  )
  return int(answer["generation"])


def _remove(path: str, generation: int) -> None:
  """Removes an object if it has still a generation."""
  bucket, _, name = path.removeprefix(storage.BUCKET).partition("/")
  with contextlib.suppress(FileNotFoundError, FileExistsError):
    storage.filesystem().call(
      "DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=str(generation)
    )
