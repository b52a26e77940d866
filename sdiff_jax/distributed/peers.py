"""Connections between process 0 and the others, over which they tell each other of an end.

A process that a signal ends at once, while it compiles for example, tells the others, and
they end in the same way. Otherwise they would wait for it, and then fail.
"""

import contextlib
import selectors
import socket
import threading

from sdiff_jax.distributed import signals

_connections: list[socket.socket] = []


def watch(connections: list[socket.socket]) -> None:
  """Watches connections from now on, in a thread.

  Args:
    connections: of process 0 to all others, or of another process to process 0.
  """
  _connections.extend(connections)
  signals.before_end(tell)
  threading.Thread(target=_watch, daemon=True, name="peers").start()


def tell(name: str) -> None:
  """Tells the processes at the other sides that a signal ends this one.

  Args:
    name: of the signal.
  """
  for connection in _connections:
    with contextlib.suppress(OSError):
      connection.sendall(f"{name}\n".encode())


def _watch() -> None:
  """Ends this process, with the others, when a process tells that it ends."""
  with selectors.DefaultSelector() as selector:
    for connection in _connections:
      connection.settimeout(1.0)
      selector.register(connection, selectors.EVENT_READ)
    while selector.get_map():
      for key, _ in selector.select():
        try:
          data = key.fileobj.recv(100)
        except OSError:
          data = b""
        if data.endswith(b"\n"):
          signals.end(data.decode(errors="replace").split()[0])
        selector.unregister(key.fileobj)  # JAX finds out what has happened
