"""Locks on directories, so that two commands do not write to one at the same time.

The lock is an advisory lock of the kernel on a file, DIRECTORY/.lock. The kernel releases
it when the process ends in whatever way, so a lock of a dead process is none. In a bucket
it is an object that its holder renews, see `io.lease`.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from typing import TypedDict

from sdiff_jax.io import records, storage
from sdiff_jax.io.lease import Lease
from sdiff_jax.types import UserError

NAME = ".lock"
MAX_BYTES = 1000  # of the file
# Errors of file systems without locks, such as some network mounts.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Holder(TypedDict):
  """Content of the file: which process holds the lock.

  Attributes:
    pid: number of the process.
    host: name of its machine.
    job: what it does.
  """

  pid: int
  host: str
  job: str


@contextlib.contextmanager
def locked(folder: str, job: str) -> Iterator[None]:
  """Locks a directory; creates it, and removes it afterwards if it is still empty.

  Args:
    folder: the directory.
    job: what holds the lock, for the message that others get.

  Raises:
    UserError: another process holds the lock.
  """
  path = os.path.join(storage.absolute(folder), NAME)
  if storage.remote(path):
    with Lease(path, job):
      yield
    return
  created = _create(os.path.dirname(path))
  try:
    descriptor = _open(path)
    try:
      about: Holder = {"pid": os.getpid(), "host": socket.gethostname(), "job": job}
      with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(about).encode())
      yield
    finally:
      with contextlib.suppress(OSError):
        os.unlink(path)
      os.close(descriptor)
  finally:
    for parent in created:
      with contextlib.suppress(OSError):  # it is in use
        os.rmdir(parent)


def _create(folder: str) -> list[str]:
  """Creates a directory with its parents; returns those that were missing, last first."""
  missing = []
  parent = folder
  while not os.path.lexists(parent):
    missing.append(parent)
    parent = os.path.dirname(parent)
  os.makedirs(folder, exist_ok=True)
  return missing


def _open(path: str) -> int:
  """Returns the descriptor of the locked file.

  Raises:
    UserError: another process holds the lock.
  """
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      about = _read(descriptor)
      os.close(descriptor)
      raise UserError(
        f"{os.path.dirname(path)} is in use by {about}; wait until it has ended, or use "
        "another --workdir"
      ) from None
    except OSError as error:
      if error.errno not in NO_LOCKS:
        os.close(descriptor)
        raise
      return descriptor
    # Its previous owner may have removed the file before it was locked here.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(descriptor), os.stat(path)):
        return descriptor
    os.close(descriptor)


def _read(descriptor: int) -> str:
  """Returns in words which process holds the lock."""
  try:
    content = os.pread(descriptor, MAX_BYTES, 0)
    about = records.decode(content, Holder, NAME)
    return f"--job={about['job']} (pid {about['pid']} on {about['host']})"
  except (OSError, UserError):
    return "another process, which has just started"
