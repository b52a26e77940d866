"""A real server on a socket: clients that are slow, gone, too many; and its end."""

import asyncio
import contextlib
import http.client
import json
import logging
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest.mock

import httpx
import pytest
import stand_ins

from sdiff_jax.serving import server
from sdiff_jax.serving.api import Service

MOST = 20  # connections


@pytest.fixture(scope="module")
def port():
  """The port of a server in a thread of this process."""
  patch = pytest.MonkeyPatch()
  patch.setattr(server, "HEAD_SECONDS", 0.5)
  opened, ended = server.listen("127.0.0.1", 0), threading.Event()
  number = opened.getsockname()[1]
  connections = server.Connections(MOST)
  service = Service(
    [stand_ins.images()],
    hosts=("127.0.0.1",),
    open_connections=lambda: connections.open,
  )
  args = (service, opened, connections, ended.is_set)
  thread = threading.Thread(target=server.run, args=args)
  thread.start()
  yield number
  ended.set()
  thread.join(30)
  patch.undo()
  assert not thread.is_alive()


def connect(port: int) -> socket.socket:
  return socket.create_connection(("127.0.0.1", port), timeout=20)


def image(port: int, seed: int = 1) -> tuple[int, bytes]:
  """Returns status and content of an image."""
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
  with contextlib.closing(connection):
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/images", json.dumps({"seed": seed}), headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def request(body: bytes, length: int | None = None) -> bytes:
  head = "POST /v1/images HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
  return f"{head}\r\nContent-Length: {length or len(body)}\r\n\r\n".encode() + body


def is_closed(opened: socket.socket) -> bool:
  """Waits until the server has closed a connection."""
  try:
    while opened.recv(65536):
      pass
  except ConnectionResetError:
    pass
  return True


def test_an_image(port):
  assert image(port)[0] == 200


def test_handlers_of_others_stay_open():
  """absl closes the stream of its handler, which may be the one that tests capture."""
  handler = logging.StreamHandler()
  handler.close = unittest.mock.Mock()
  with server.listen("127.0.0.1", 0) as opened:
    service = Service([stand_ins.images()], hosts=("127.0.0.1",), open_connections=int)
    server.run(service, opened, server.Connections(MOST), lambda: True)
  handler.close.assert_not_called()


def test_clients_that_go_in_the_middle(port):
  for sent in (
    b"",
    b"POST /v1/ima",
    request(b'{"seed": 1}')[:-4],
    request(b'{"seed": 1}'),
  ):
    with connect(port) as opened:
      opened.sendall(sent)
  assert image(port)[0] == 200


def test_a_client_whose_request_does_not_come_is_closed(port):
  with connect(port) as silent, connect(port) as slow, connect(port) as again:
    slow.sendall(b"POST /v1/images HTTP/1.1\r\nHo")
    again.sendall(request(b'{"seed": 1}'))
    assert b"200 OK" in again.recv(4096)
    again.sendall(b"GET /healthz HT")
    begin = time.monotonic()
    assert is_closed(silent)
    assert is_closed(slow)
    assert is_closed(again)
    assert time.monotonic() - begin < 10


def test_a_hundred_megabytes(port):
  """They are refused by their length, and the connection ends before they are sent."""
  part, sent = b" " * (1 << 20), 0
  with connect(port) as opened:
    opened.sendall(request(b"", length=100 * len(part)))
    with contextlib.suppress(ConnectionError):
      for _ in range(100):
        opened.sendall(part)
        sent += 1
    with contextlib.suppress(ConnectionError):
      assert b" 413 " in opened.recv(4096)
  assert sent < 50
  assert image(port)[0] == 200


@pytest.mark.parametrize(
  "content",
  [
    b"\x00\x01\x02\x03\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 200_000,
    b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: 1\r\n" % k for k in range(50_000)),
    b"POST /v1/images HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/images HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1" + b"0" * 30,
  ],
  ids=range(7),
)
def test_what_is_no_http(port, content):
  with connect(port) as opened:
    with contextlib.suppress(ConnectionError):
      opened.sendall(content)
    assert is_closed(opened)
  assert image(port)[0] == 200


def test_connections_beyond_the_bound_are_closed(port):
  held = [connect(port) for _ in range(4 * MOST)]
  time.sleep(0.1)
  closed = 0
  for opened in held:
    opened.setblocking(False)
    with contextlib.suppress(BlockingIOError):
      with contextlib.suppress(ConnectionResetError):
        assert opened.recv(1) == b""
      closed += 1
  assert closed >= 3 * MOST
  for opened in held:
    opened.close()
  deadline = time.monotonic() + 10
  while time.monotonic() < deadline:
    with contextlib.suppress(ConnectionError, http.client.HTTPException):
      assert image(port)[0] == 200
      return
  pytest.fail("the service did not come back")


def test_sigterm_under_load():
  """Each request is answered, or its connection was not taken; none is cut in half."""
  script = pathlib.Path(__file__).with_name("serve_stand_ins.py")
  process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
  with process, contextlib.ExitStack() as stack:
    stack.callback(process.kill)
    number = int(process.stdout.readline())
    codes, cut = asyncio.run(_load(number, process))
    assert process.wait(60) == 75
  assert codes.count(200) > 20
  assert {*codes} <= {200, 503}
  assert cut == 0


async def _load(port: int, process: subprocess.Popen) -> tuple[list[int], int]:
  """Asks with 16 clients until the server has ended; returns codes and cut answers."""
  codes: list[int] = []
  cut = 0

  async def ask(client: httpx.AsyncClient, seed: int) -> None:
    nonlocal cut
    for k in range(10_000):
      try:
        answer = await client.post("/v1/images", json={"seed": 100 * k + seed})
      except (httpx.ConnectError, httpx.ReadError, httpx.WriteError):
        return  # not taken
      except httpx.RemoteProtocolError as error:
        cut += "incomplete" in str(error)
        return
      codes.append(answer.status_code)
      if len(codes) == 40:
        process.send_signal(signal.SIGTERM)

  async with httpx.AsyncClient(
    base_url=f"http://127.0.0.1:{port}", timeout=30
  ) as client:
    await asyncio.gather(*(ask(client, seed) for seed in range(16)))
  return codes, cut
