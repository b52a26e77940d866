"""The processes of one job compare what they are about to do, before JAX starts.

Process 0 listens at the coordinator's address, where JAX's coordinator will listen
afterwards. Every other process connects and sends a description of its command; process 0
waits for all of them, compares the descriptions with its own and sends the same verdict
to all. The messages are lines of JSON. This module imports no JAX.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

from sdiff_jax.types import Json, UserError

GREETING = b"sdiff_jax\n"  # first line of process 0
GREETING_SECONDS = 20.0
MAX_LINE = 2**22  # bytes
MAX_SHOWN = 3  # differences in a message
REPORT_SECONDS = 30.0  # between two lines that say for whom process 0 waits
LINGER_SECONDS = 20.0  # in which process 0 tells a mistake to those that come late
COUNT = "JAX_NUM_PROCESSES"
PROBLEM = "problem"  # key of a mistake that a process has found in its own command
ADDRESS = "JAX_COORDINATOR_ADDRESS"


class Refused(UserError):
  """The processes do not fit together; all of them have been told."""


class Place(NamedTuple):
  """Where a process stands among the processes of a job.

  Attributes:
    address: host:port of process 0.
    count: number of processes.
    index: number of this process.
  """

  address: str
  count: int
  index: int

  def endpoint(self) -> tuple[str, int]:
    """Returns host and port of the address.

    Raises:
      UserError: the address does not have that form.
    """
    host, _, port = self.address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
      raise UserError(
        f"{ADDRESS}={self.address[:100]!r}: must be host:port, with a port from 1 to "
        "65535"
      )
    return host, int(port)


def meet(place: Place, about: Mapping[str, Json], limit: float) -> list[socket.socket]:
  """Waits for all processes, and checks that they are about to do the same.

  Args:
    place: of this process.
    about: what must be equal in all processes, flat; PROBLEM -> a mistake that makes all
      of them stop, or "".
    limit: longest time to wait for the other processes, s.

  Returns:
    Connections: of process 0 to all others, of another process to process 0.

  Raises:
    Refused: the processes differ, one of them has found a mistake or does not come
      within the limit, or the address is not valid or not free.
  """
  host, port = place.endpoint()
  about = {
    **about,
    COUNT: place.count,
    "host": socket.gethostname(),
    "pid": os.getpid(),
  }
  mine = json.loads(json.dumps(about))  # with lists for tuples, as the others see it
  with contextlib.ExitStack() as stack:
    if place.index == 0:
      connections, problem = _host(port, place, mine, limit)
    else:
      connections, problem = _join(host, port, place, mine, limit)
    for connection in connections:
      stack.enter_context(connection)
    if problem:
      raise Refused(problem)
    stack.pop_all()  # the connections stay open
    return connections


def verdict(descriptions: Mapping[int, Mapping[str, Json]], count: int) -> str:
  """Returns why the processes cannot run together, "" if they can.

  Args:
    descriptions: number of a process -> its description.
    count: number of processes that should be there.

  Example:
    >>> verdict({0: {"job": "train"}, 1: {"job": "sample"}}, 2)[:55]
    "the processes differ: job ('train' in process 0, 'sampl"
  """
  for index, about in sorted(descriptions.items()):
    if about.get(PROBLEM):
      where = "" if len(descriptions) == 1 else f"process {index}: "
      return f"{where}{about[PROBLEM]}"
  first, skipped = descriptions[0], {PROBLEM, "host", "pid"}
  parts = []
  for index, about in sorted(descriptions.items()):
    for name in sorted((first.keys() | about.keys()) - skipped, key=_order):
      if first.get(name) != about.get(name):
        mine, other = (repr(x.get(name))[:60] for x in (first, about))
        parts.append(f"{name} ({mine} in process 0, {other} in process {index})")
  if not parts:
    return ""
  more = f" and {len(parts) - MAX_SHOWN} more" if len(parts) > MAX_SHOWN else ""
  return (
    f"the processes differ: {', '.join(parts[:MAX_SHOWN])}{more}; start all {count} with "
    "the same command"
  )


def _order(name: str) -> tuple[bool, str]:
  """Returns the key that sorts names: those of the config come last."""
  return name.startswith("config."), name


class _Arrivals:
  """The processes that have come to process 0.

  Attributes:
    place: of process 0.
    descriptions: number of a process -> its description.
    connections: to these processes.
    expected: number of connections after which all have come.
    problem: why they cannot run together, "" if no reason is known yet.
  """

  def __init__(self, place: Place, about: Mapping[str, Json]):
    self.place, self.descriptions = place, {0: about}
    self.connections: list[socket.socket] = []
    self.expected, self.problem = place.count - 1, ""

  def add(self, connection: socket.socket) -> None:
    """Greets what has connected, and keeps the connection if it is a process."""
    index, about = _greet(connection)
    if about is None:
      connection.close()  # not a process of this package
      return
    self.connections.append(connection)
    count, first = self.place.count, self.descriptions[0]
    if about.get(COUNT) != count:
      self.expected = max(self.expected, int(about.get(COUNT) or 0) - 1)
      self.problem = self.problem or verdict({0: first, index: about}, count)
    elif not 0 < index < count or index in self.descriptions:
      duplicate = _duplicate(index, count, self.descriptions, about)
      self.problem = self.problem or duplicate
    self.descriptions.setdefault(index, about)

  def missing(self) -> str:
    """Returns in words which processes are missing."""
    indices = sorted({*range(self.place.count)} - self.descriptions.keys())
    return f"{_names(indices)} of {self.place.count}"


def _host(
  port: int, place: Place, about: Mapping[str, Json], limit: float
) -> tuple[list[socket.socket], str]:
  """Waits for the other processes as process 0; returns connections and verdict."""
  arrivals = _Arrivals(place, about)
  start = shown = time.monotonic()
  try:
    server = _listen(port)
  except OSError as error:
    reason = os.strerror(error.errno or 0)
    problem = (
      f"{ADDRESS}={place.address}: port {port} cannot be used ({reason}); is another job "
      "or another process 0 running? Choose a free port"
    )
    return [], problem
  with server:
    while len(arrivals.connections) < arrivals.expected:
      now = time.monotonic()
      if now - start > limit:
        arrivals.problem = arrivals.problem or (
          f"{arrivals.missing()} did not come to {place.address} within {limit:.0f} s; "
          "see --peer_timeout"
        )
        break
      if now - shown > REPORT_SECONDS:
        shown = now
        line = f"waiting at {place.address} for {arrivals.missing()}"
        left = f"up to {start + limit - now:.0f} s more"
        print(f"{line}, {left}", file=sys.stderr, flush=True)
      server.settimeout(max(0.05, min(1.0, start + limit - now)))
      try:
        connection, _ = server.accept()
      except TimeoutError:
        continue
      arrivals.add(connection)
      if arrivals.problem:  # not all of them will come
        limit = min(limit, time.monotonic() - start + LINGER_SECONDS)
  problem = arrivals.problem or verdict(arrivals.descriptions, place.count)
  for connection in arrivals.connections:
    _send(connection, {"verdict": problem})
  return arrivals.connections, problem


def _listen(port: int) -> socket.socket:
  """Returns a listening socket on all addresses of this machine."""
  if socket.has_dualstack_ipv6():
    return socket.create_server(
      ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
    )
  return socket.create_server(("", port), backlog=1024)


def _greet(connection: socket.socket) -> tuple[int, dict[str, Json] | None]:
  """Returns number and description of a process, None if it is of another program."""
  connection.settimeout(5.0)
  try:
    connection.sendall(GREETING)
    message = _receive(connection)
    return int(message["index"]), dict(message["about"])
  except (OSError, ValueError, KeyError, TypeError):
    return -1, None


def _duplicate(
  index: int, count: int, descriptions: Mapping[int, Mapping[str, Json]], other: Json
) -> str:
  """Returns the message about a number that two processes have, or that is too large."""
  if not 0 <= index < count:
    return (
      f"JAX_PROCESS_ID={index}: must be from 0 to {count - 1}, with {count} processes"
    )
  one = descriptions[index]
  return (
    f"JAX_PROCESS_ID={index}: two processes have it, pid {one['pid']} on {one['host']} and "
    f"pid {other.get('pid')} on {other.get('host')}; give each process its own number"
  )


def _join(
  host: str, port: int, place: Place, about: Mapping[str, Json], limit: float
) -> tuple[list[socket.socket], str]:
  """Sends the description to process 0; returns the connection and the verdict."""
  deadline = time.monotonic() + limit
  connection = _connect(host, port, place, deadline, limit)
  connection.settimeout(GREETING_SECONDS)
  try:
    greeting = connection.recv(len(GREETING), socket.MSG_WAITALL)
  except OSError:
    greeting = b""
  if greeting != GREETING:
    problem = (
      f"{ADDRESS}={place.address}: what listens there is no process that waits for "
      "others; the job may be running already with all its processes, or another "
      "program uses the port"
    )
    return [connection], problem
  _send(connection, {"index": place.index, "about": about})
  # Process 0 may have begun to wait later than this process.
  connection.settimeout(limit + REPORT_SECONDS)
  try:
    return [connection], str(_receive(connection)["verdict"])
  except (OSError, ValueError, KeyError, TypeError):
    problem = (
      f"process 0 at {place.address} ended before all {place.count} processes had come"
    )
    return [connection], problem


def _connect(
  host: str, port: int, place: Place, deadline: float, limit: float
) -> socket.socket:
  """Returns a connection to process 0, which may start later than this process."""
  while True:
    try:
      connection = socket.create_connection((host, port), timeout=5.0)
      # A local connection to a port on which nobody listens may be one to itself.
      if connection.getsockname() != connection.getpeername():
        return connection
      connection.close()
      reason = "no answer"
    except OSError as error:
      reason = error.strerror or str(error)
    if time.monotonic() > deadline:
      raise Refused(
        f"{ADDRESS}={place.address}: process 0 does not answer within {limit:.0f} s "
        f"({reason}); see --peer_timeout"
      )
    time.sleep(0.2)


def _send(connection: socket.socket, message: Json) -> None:
  """Sends a line of JSON, unless the other side has gone."""
  with contextlib.suppress(OSError):
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> Json:
  """Returns the value of the next line."""
  data = bytearray()
  while not data.endswith(b"\n"):
    chunk = connection.recv(2**16)
    if not chunk or len(data) > MAX_LINE:
      raise ValueError("the line is incomplete")
    data += chunk
  return json.loads(data)


def _names(indices: list[int]) -> str:
  """Returns "process 1" or "processes 1, 2, 3, ...": some of the numbers."""
  shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
  return f"process{'es' if len(indices) > 1 else ''} {shown}"
