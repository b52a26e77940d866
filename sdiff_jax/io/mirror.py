"""Files that grow while a job runs, in a bucket, where nothing can be appended to.

They grow in a folder of this machine. A thread uploads those that have changed, whole, at
most every SECONDS, and spends at most FRACTION of the time on it; nobody waits for it.
"""

import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from sdiff_jax.io import storage

SECONDS = 30.0  # at least, between two uploads
FRACTION = 0.05  # of the time, at most, is spent on uploads


@contextlib.contextmanager
def mirrored(folder: str) -> Iterator[tuple[str, Callable[[], None]]]:
  """Yields a folder of this machine, and a function that uploads its files soon.

  When the block ends, in whatever way, all files are uploaded.

  Args:
    folder: of the files. One of this machine is yielded itself, and nothing is uploaded.
  """
  if not storage.remote(folder):
    yield folder, lambda: None
    return
  with tempfile.TemporaryDirectory() as local:
    mirror = _Mirror(local, folder)
    try:
      yield local, mirror.wake.set
    finally:
      mirror.close()


class _Mirror:
  """The thread that uploads the files below a folder."""

  def __init__(self, source: str, target: str):
    self.wake = threading.Event()
    self._source, self._target = source, target
    self._sizes: dict[str, int] = {}
    self._closing = False
    self._thread = threading.Thread(target=self._run, daemon=True, name="mirror")
    self._thread.start()

  def close(self) -> None:
    """Waits for the thread, and uploads what is left."""
    self._closing = True
    self.wake.set()
    self._thread.join()
    self._upload()

  def _run(self) -> None:
    pause = SECONDS
    while not self._closing:
      self.wake.wait(pause)
      self.wake.clear()
      begin = time.monotonic()
      try:
        self._upload()
      except Exception as error:  # of the network: the next attempt may succeed
        print(f"{self._target}: not uploaded: {error}", file=sys.stderr)
      pause = max(SECONDS, (time.monotonic() - begin) / FRACTION)

  def _upload(self) -> None:
    """Uploads the files whose sizes have changed."""
    for parent, _, names in os.walk(self._source):
      for name in names:
        path = os.path.join(parent, name)
        size = os.path.getsize(path)
        if self._sizes.get(path) != size:
          inside = os.path.relpath(path, self._source)
          storage.upload(path, os.path.join(self._target, inside))
          self._sizes[path] = size
