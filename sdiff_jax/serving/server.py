"""The process that serves: uvicorn with bounds on connections, and an end in order."""

import asyncio
import concurrent.futures
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sdiff_jax.serving.api import Service

MAX_CONNECTIONS = 1024
MAX_HEAD = 1 << 16  # bytes of a request line and its headers
HEAD_SECONDS = 10.0  # from the first byte of a request until its headers must be there
IDLE_SECONDS = 30.0  # between two requests of a connection
STOP_SECONDS = 20.0  # for the answers to requests that were taken
POLL_SECONDS = 0.1


class Connections:
  """The number of open connections, which the protocol and the metrics share."""

  def __init__(self, most: int = MAX_CONNECTIONS):
    """Stores the bound.

    Args:
      most: number of connections; further ones are closed at once.
    """
    self.most, self.open = most, 0

  def protocol(self) -> type[HttpToolsProtocol]:
    """Returns uvicorn's protocol with these bounds."""
    connections = self

    class Bounded(HttpToolsProtocol):
      """Closes connections that are too many, or whose headers do not come."""

      _timer: asyncio.TimerHandle | None = None
      _head = 0

      def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        connections.open += 1
        if connections.open > connections.most:
          transport.abort()
          return
        self._timer = self.loop.call_later(HEAD_SECONDS, transport.abort)

      def connection_lost(self, exc: Exception | None) -> None:
        connections.open -= 1
        self._in_time()
        super().connection_lost(exc)

      def data_received(self, data: bytes) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle:
          self._head += len(data)
          if self._head > MAX_HEAD + len(data):
            self.transport.abort()
            return
          if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
        super().data_received(data)

      def on_headers_complete(self) -> None:
        self._in_time()
        self._head = 0
        super().on_headers_complete()

      def _in_time(self) -> None:
        if self._timer is not None:
          self._timer.cancel()
          self._timer = None

    return Bounded


class _Server(uvicorn.Server):
  """uvicorn's server, which leaves signals to the job."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield


def listen(host: str, port: int) -> socket.socket:
  """Returns a socket that listens.

  Args:
    host: name or address of this machine.
    port: number; 0 for any that is free.

  Raises:
    OSError: the port is taken, or the host is not this machine.

  Example:
    >>> with listen("127.0.0.1", 0) as opened:
    ...   opened.getsockname()[0]
    '127.0.0.1'
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  return socket.create_server((host, port), family=family, backlog=2048)


def run(
  service: Service,
  opened: socket.socket,
  connections: Connections,
  should_stop: Callable[[], bool],
) -> None:
  """Serves until it is asked to stop, and answers what was taken by then.

  Args:
    service: what answers.
    opened: the socket.
    connections: their bound.
    should_stop: asked ten times a second.
  """
  config = uvicorn.Config(
    service.app,
    http=connections.protocol(),
    ws="none",
    lifespan="off",
    log_config=None,  # uvicorn's own closes every handler of this process
    log_level="critical",
    access_log=False,
    server_header=False,
    backlog=2048,
    timeout_keep_alive=int(IDLE_SECONDS),
    timeout_graceful_shutdown=int(STOP_SECONDS),
  )
  server = _Server(config)

  async def serve() -> None:
    service.batcher.start()
    serving = asyncio.ensure_future(server.serve(sockets=[opened]))
    while not serving.done() and not should_stop():
      await asyncio.wait([serving], timeout=POLL_SECONDS)
    service.batcher.stop()
    server.should_exit = True
    await serving
    await service.batcher.drain()

  def loop() -> None:
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
      runner.run(serve())

  # Not in the main thread, where an event loop would take the signals from the job.
  with concurrent.futures.ThreadPoolExecutor(1, "server") as thread:
    thread.submit(loop).result()
