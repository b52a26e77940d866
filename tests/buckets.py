"""A bucket of an emulator of Google Cloud Storage on this machine."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

NAME = "gs://test"


def environment(port: int) -> dict[str, str]:
  """Returns what leads every client to the emulator."""
  url = f"http://127.0.0.1:{port}"
  return {
    "STORAGE_EMULATOR_HOST": url,  # gcsfs
    "TENSORSTORE_GCS_HTTP_URL": url,  # and so Orbax
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record
    # Otherwise gcsfs asks Google for the kind of the bucket.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "FSSPEC_GCS_TOKEN": "anon",
    "FSSPEC_GCS_PROJECT": "test",
    "GOOGLE_CLOUD_PROJECT": "test",
    "NO_GCE_CHECK": "true",
  }


@contextlib.contextmanager
def emulator() -> Iterator[tuple[int, int]]:
  """Runs the emulator with an empty bucket, and yields its port and its process."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--in-memory"]
  command += ["--host=127.0.0.1", f"--port={port}", "--default-bucket=test"]
  quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
  process = subprocess.Popen(command, **quiet)
  try:
    deadline = time.monotonic() + 60
    while True:
      assert process.poll() is None
      with contextlib.suppress(ConnectionError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        break
      assert time.monotonic() < deadline
      time.sleep(0.05)
    yield port, process.pid
  finally:
    process.kill()
    process.wait()


@contextlib.contextmanager
def bucket() -> Iterator[tuple[str, int]]:
  """Yields a bucket that this process and its children use, and the emulator's process."""
  with emulator() as (port, pid), pytest.MonkeyPatch.context() as patch:
    for name, value in environment(port).items():
      patch.setenv(name, value)
    yield NAME, pid
