"""A program of another Python, such as one that has PyTorch, asked line by line."""

import json
import subprocess
from typing import Any, Self


class Peer:
  """A process that answers each line of JSON on its stdin with one on its stdout.

  As a context manager it closes stdin at the end, which ends such a process.
  """

  def __init__(self, *command: str):
    """Starts the process.

    Args:
      command: the Python, the script and its arguments.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    self._process = subprocess.Popen(command, text=True, **pipes)

  def read(self) -> Any:
    """Returns the next line, as of a process that has something to say at its start.

    Raises:
      SystemExit: the process has ended, with its reason on stderr.
    """
    line = self._process.stdout.readline()
    if not line:
      raise SystemExit(f"{self._process.args[1]} ended with {self._process.wait()}")
    return json.loads(line)

  def ask(self, request: Any = None) -> Any:
    """Returns the answer to a request."""
    print(json.dumps(request), file=self._process.stdin, flush=True)
    return self.read()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()
