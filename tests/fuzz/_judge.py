"""Decides whether the package handled an input as promised.

Whatever a file or a field holds, the call returns, or raises one `UserError` whose
message is one line of at most 500 characters. It needs at most 10 s of processor time
and 2 GB of memory, writes and removes no file, starts no process, opens no connection,
and runs no code of the input.
"""

import contextlib
import faulthandler
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from sdiff_jax.types import UserError

MAX_MESSAGE = 500  # characters
MAX_SECONDS = 10.0  # of processor time
MAX_WAIT = 120.0  # s, after which a call that waits for something is stopped
MAX_BYTES = 2 << 30
# Above MAX_BYTES, so that a reader which needs too much is measured and not stopped.
MAX_ADDRESS_SPACE = 5 << 30
FORBIDDEN = {
  *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"),
  *("subprocess.Popen", "socket.connect", "socket.bind", "pty.spawn", "os.kill"),
  *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink"),
  *("os.truncate", "os.chmod", "shutil.rmtree", "shutil.move", "shutil.copyfile"),
  "webbrowser.open",
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CANARY = "canary"  # part of the name of a file that only code of an input writes
_events: list[str] | None = None  # of the call that is running


class Broken(AssertionError):
  """The package did not keep a promise."""


class TooSlow(BaseException):
  """A call has used its time; no reader catches it."""


def _audit(event: str, args: tuple) -> None:
  if _events is None:
    return
  text = repr(args)
  # Python and XLA keep compiled code; neither comes from the input.
  if "__pycache__" in text or "sdiff_jax_tests" in text:
    return
  if event in FORBIDDEN:
    _events.append(f"{event} {text}")
  writes = event == "open" and isinstance(args[2], int) and args[2] & WRITES
  if writes and not str(args[0]).startswith(("/proc/", os.devnull)):
    _events.append(f"open {args[0]!r} for writing")


sys.addaudithook(_audit)


def _alarm(number: int, frame: Any) -> None:
  raise TooSlow("waited" if number == signal.SIGALRM else "computed")


@contextlib.contextmanager
def _limits() -> Iterator[None]:
  """Limits processor time, waiting and address space of a block."""
  before = {s: signal.signal(s, _alarm) for s in (signal.SIGALRM, signal.SIGPROF)}
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (used + MAX_ADDRESS_SPACE, hard))
  # A loop in C code cannot be interrupted: the process then ends with a traceback.
  faulthandler.dump_traceback_later(3 * MAX_WAIT, exit=True, file=sys.__stderr__)
  signal.setitimer(signal.ITIMER_REAL, MAX_WAIT)
  signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    for number, handler in before.items():
      signal.signal(number, handler)


def _resident(reset: bool = False) -> int:
  """Returns the largest resident memory since the last reset, or the present one."""
  if reset:
    with open("/proc/self/clear_refs", "w") as file:
      file.write("5")
  with open("/proc/self/status") as file:
    line = next(line for line in file if line.startswith("VmHWM"))
  return int(line.split()[1]) << 10


def _listing(folder: str) -> dict[str, tuple]:
  """Returns size and time of change of everything below a folder."""
  listing, folders = {}, [folder]
  while folders:
    with os.scandir(folders.pop()) as entries:
      for entry in entries:
        status = entry.stat(follow_symlinks=False)
        is_folder = entry.is_dir(follow_symlinks=False)
        folders += [entry.path] if is_folder else []
        listing[entry.path] = (is_folder or status.st_size, status.st_mtime_ns)
  return listing


def judge(call: Callable[[], Any], folder: str) -> str:
  """Calls the package on an input, and checks what it did.

  Args:
    call: reads the input.
    folder: where the input is; nothing in it may change.

  Returns:
    "" if the input was read, or the message of the `UserError`.

  Raises:
    Broken: a promise was not kept.
  """
  global _events
  listing, memory, begin = _listing(folder), _resident(reset=True), time.process_time()
  message, events, problem = "", [], ""
  cause: BaseException | None = None
  _events = events
  try:
    with _limits():
      call()
  except UserError as error:
    message = str(error)
    if not message.strip():
      problem = "an empty message"
  except TooSlow as error:
    problem, cause = f"it {error} for too long", error
  except Exception as error:
    problem, cause = f"{type(error).__name__}: {str(error)[:300]}", error
  finally:
    _events = None
  if not problem:
    seconds, size = time.process_time() - begin, _resident() - memory
    line = " ".join(message.split())  # as the command line prints it
    if events:
      problem = "; ".join(events)[:300]
    elif len(line) > MAX_MESSAGE:
      problem = f"a message of {len(line)} characters"
    elif seconds > MAX_SECONDS:
      problem = f"{seconds:.1f} s of processor time"
    elif size > MAX_BYTES:
      problem = f"{size / 2**30:.1f} GB of memory"
    elif "MemoryError" in message or "allocate" in message:
      problem = f"it asked for too much memory: {message[:300]}"
    elif _listing(folder) != listing:
      problem = "it changed the folder of the input"
  if problem:
    raise Broken(f"{problem} [message: {message[:200]!r}]") from cause
  return message
