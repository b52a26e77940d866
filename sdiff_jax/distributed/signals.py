"""Signals that stop a job: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a lost connection).

A job that is stopped leaves complete files, says so in one line and ends with the exit
code STOPPED; the same command resumes it. A loop that has something to save asks
`stopping()` after each step. Everywhere else, while modules are imported, programs are
compiled or files are written, the process ends at once: all files are written
atomically, so nothing has to be saved.

A thread receives the signals, since Python's own handlers wait until a call of compiled
code returns. This module imports no JAX, so that `install` can come first.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

STOPPED = 75  # exit code of a job that was stopped and can be resumed
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOOP_SECONDS = 25.0  # from the signal until the loop must have stopped
SAVE_SECONDS = 100.0  # from then on until everything must be saved


class Stopped(Exception):
  """A signal stopped a job; the message is one line that says how to resume."""


class _State:
  """What the handlers share. There is one, since a process has one set of handlers.

  Attributes:
    installed: whether `install` was called.
    lock: held while one of the other attributes changes.
    received: name of the first signal, "" before.
    num_loops: number of loops that poll at present.
    jax_handler: JAX's own handler of SIGTERM, which the other processes hear of.
    timer: ends the process when its time is over.
    before_end: called with the name of the signal before the process ends at once.
  """

  def __init__(self) -> None:
    self.installed = False
    self.lock = threading.RLock()
    self.received = ""
    self.num_loops = 0
    self.jax_handler: Callable[[int], None] | None = None
    self.timer: threading.Timer | None = None
    self.before_end: Callable[[str], None] = lambda name: None


_state = _State()


def install() -> None:
  """Handles the signals of this process from now on; for the command line alone.

  SIGHUP stays ignored if it is ignored, as under nohup.
  """
  reader, writer = socket.socketpair()
  writer.setblocking(False)
  signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
  for number in SIGNALS:
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, _do_nothing)
  _state.installed = True

  def watch(writer: socket.socket) -> None:  # keeps both sockets open
    while True:
      for number in reader.recv(64):
        _receive(number)

  threading.Thread(target=watch, args=[writer], daemon=True, name="signals").start()


def install_after_jax() -> None:
  """Takes SIGTERM back from JAX, which has set its own handler for several processes.

  JAX's handler is called while a loop polls: it is what makes all processes stop after
  the same step. Python has no function for handlers that are not its own.
  """
  if not _state.installed:
    return
  libc = ctypes.CDLL(None)
  libc.signal.restype, libc.signal.argtypes = (
    ctypes.c_void_p,
    [
      ctypes.c_int,
      ctypes.c_void_p,
    ],
  )
  address = libc.signal(signal.SIGTERM, None)
  signal.signal(signal.SIGTERM, _do_nothing)
  if address and address != ctypes.c_void_p(-1).value:
    _state.jax_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(address)


def before_end(call: Callable[[str], None]) -> None:
  """Sets what is called, with the name of the signal, before the process ends at once."""
  _state.before_end = call


def received() -> bool:
  """Returns whether a signal has been received."""
  return bool(_state.received)


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
  """Yields a function that returns whether a signal asks the loop to stop.

  The loop then saves and returns. Without `install`, as in a notebook, SIGTERM alone is
  handled, and the previous handler is restored afterwards; Python allows handlers in the
  main thread only.
  """
  if not _state.installed:
    if threading.current_thread() is not threading.main_thread():
      yield lambda: False
      return
    event = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda number, frame: event.set())
    try:
      yield event.is_set
    finally:
      signal.signal(signal.SIGTERM, previous)
    return
  with _state.lock:
    _state.num_loops += 1
  try:
    yield lambda: received() and saving()
  finally:
    with _state.lock:
      _state.num_loops -= 1


def saving() -> bool:
  """Allows SAVE_SECONDS, because the loop has stopped and saves; returns True."""
  if received():
    _end_after(SAVE_SECONDS)
  return True


def end(name: str) -> None:
  """Ends the process at once, with one line on stderr and the code STOPPED.

  Args:
    name: of the signal.
  """
  _state.before_end(name)
  line = f"{name}: stopped; repeat the command to resume\n"
  start = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""  # below a bar
  with contextlib.suppress(OSError):  # stderr may be closed
    # The main thread may hold the lock of sys.stderr.
    os.write(2, (start + line).encode())
  os._exit(STOPPED)


def _do_nothing(number: int, frame: object) -> None:
  """Makes Python write the number of the signal to the socket of `install`."""


def _receive(number: int) -> None:
  """Handles one signal, in the thread of `install`."""
  name = signal.Signals(number).name
  with _state.lock:
    again = _state.received == name == "SIGINT"
    if again or not (_state.num_loops or _state.received):
      end(name)
    if _state.received:
      return
    _state.received = name
    _end_after(LOOP_SECONDS)
  if _state.jax_handler is not None:
    _state.jax_handler(signal.SIGTERM)


def _end_after(seconds: float) -> None:
  """Ends the process after so many seconds, unless it has ended by itself."""
  with _state.lock:
    if _state.timer is not None:
      _state.timer.cancel()
    _state.timer = threading.Timer(seconds, end, [_state.received])
    _state.timer.daemon = True
    _state.timer.start()
