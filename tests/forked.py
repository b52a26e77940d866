"""Programs in processes of their own, forked from one that has all modules loaded.

Such a process is as real as one that a shell starts: it can be killed, and shares nothing
with others. It starts a few seconds of processor time earlier.
"""

import atexit
import functools
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping

ROOT = pathlib.Path(__file__).parents[1]
# What jobs import, early or late.
MODULES = ("sdiff_jax.main", "orbax.checkpoint.v1", "gcsfs", "grain.python", "clu")
MODULES += ("tensorboardX", "clu.parameter_overview", "sklearn.datasets", "etils.epath")
COMMAND = "from sdiff_jax import main\nmain.signals.install()\nmain._program()\n"
# States of unfinished files are saved five times a second, however long that takes.
SAVING_OFTEN = "from sdiff_jax.io import snapshot\n"
SAVING_OFTEN += "snapshot.SECONDS, snapshot.FRACTION = 0.2, 1.0\n" + COMMAND


class Process:
  """A running program, with the methods of `subprocess.Popen` that tests use."""

  def __init__(self, process: multiprocessing.Process, output: str):
    self._process, self._output = process, output

  @property
  def returncode(self) -> int | None:
    return self._process.exitcode

  def poll(self) -> int | None:
    return self._process.exitcode

  def kill(self) -> None:
    self._process.kill()

  def send_signal(self, number: signal.Signals) -> None:
    os.kill(self._process.pid, number)

  def said(self) -> str:
    """Returns what was printed so far."""
    with open(self._output, errors="replace") as file:
      return file.read()

  def wait(self, timeout: float = 300) -> str:
    """Waits for the end, and returns what was printed; kills it after `timeout` s."""
    self._process.join(timeout)
    if self._process.exitcode is None:
      self.kill()
      self._process.join()
      raise TimeoutError(f"not ended after {timeout} s: {self.said()[-3000:]}")
    return self.said()


def start(*args: str, env: Mapping[str, str], script: str = COMMAND) -> Process:
  """Starts a program.

  Args:
    args: of its command line.
    env: variables of its environment; those that are read when JAX is imported have no
      effect.
    script: what it runs; the command line of the package unless given.
  """
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([*MODULES])
  number, output = tempfile.mkstemp(dir=_outputs())
  os.close(number)
  process = context.Process(
    target=_run, args=(script, args, dict(env), output), daemon=True
  )
  process.start()
  return Process(process, output)


def finish(processes: list[Process], code: int = 0, timeout: float = 300) -> str:
  """Waits for processes that must end with a code, and returns what they said."""
  deadline = time.monotonic() + timeout
  said = [p.wait(max(deadline - time.monotonic(), 1)) for p in processes]
  codes = [p.returncode for p in processes]
  assert codes == [code] * len(codes), "\n".join(text[-4000:] for text in said)
  return "\n".join(said)


@functools.cache
def _outputs() -> str:
  """Returns a folder of what programs print, which is there until the tests end."""
  folder = tempfile.mkdtemp(prefix="sdiff_jax_outputs_")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


def _run(script: str, args: tuple[str, ...], env: dict[str, str], output: str) -> None:
  """Runs a script in this process, up to what Python does at its end."""
  os.environ.clear()
  os.environ.update(env)
  os.chdir(ROOT)
  file = os.open(output, os.O_WRONLY | os.O_APPEND)
  os.dup2(file, 1)
  os.dup2(file, 2)
  sys.argv = ["main", *args]
  try:
    exec(script, {"__name__": "__main__"})
  finally:
    threading._shutdown()
    atexit._run_exitfuncs()
