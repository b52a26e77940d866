"""Processes that compare their commands, as threads that talk over 127.0.0.1."""

import concurrent.futures
import socket
import time

import pytest

from sdiff_jax.distributed import handshake
from sdiff_jax.types import UserError


def free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def meet(*abouts, count=0, limit=20.0, indices=None, port=0, delay=0.0, counts=()):
  """Returns what each process is told, "" where it may go on, and the seconds of all."""
  address = f"127.0.0.1:{port or free_port()}"
  indices = indices or range(len(abouts))

  def one(index, about):
    time.sleep(delay * index)
    own = counts[index] if counts else count or len(abouts)
    place = handshake.Place(address, own, index)
    try:
      for connection in handshake.meet(place, about, limit):
        connection.close()
    except UserError as error:
      return str(error)
    return ""

  with concurrent.futures.ThreadPoolExecutor() as pool:
    start = time.monotonic()
    told = [*pool.map(one, indices, abouts)]
    return told, time.monotonic() - start


SAME = {"--job": "train", "--workdir": "/runs/a", "config.data.mean": (0.5, 0.5)}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_processes_that_agree_go_on(order):
  told, _ = meet(SAME, SAME, SAME, indices=order, delay=0.1)
  assert told == ["", "", ""]


def test_what_differs_is_one_line_in_each():
  told, seconds = meet(SAME, SAME | {"--job": "sample", "config.data.mean": (0.5, 0.4)})
  line = (
    "the processes differ: --job ('train' in process 0, 'sample' in process 1), "
    "config.data.mean ([0.5, 0.5] in process 0, [0.5, 0.4] in process 1); start all 2 "
    "with the same command"
  )
  assert told == [line, line]
  assert seconds < 5


def test_many_differences_are_a_short_line():
  other = {f"config.field{k}": "x" * 1000 for k in range(1000)}
  told, _ = meet(SAME, SAME | other)
  assert told[0] == told[1]
  assert len(told[0]) < 500
  assert "and 997 more" in told[0]


@pytest.mark.parametrize("index", [0, 1])
def test_a_mistake_of_one_process_reaches_all(index):
  abouts = [SAME, SAME, SAME]
  abouts[index] = {handshake.PROBLEM: "config.seed=-1: must not be negative"}
  told, _ = meet(*abouts)
  line = f"process {index}: config.seed=-1: must not be negative"
  assert told == [line, line, line]


def test_a_number_that_two_processes_have():
  told, seconds = meet(SAME, SAME, SAME, indices=[0, 1, 1])
  assert told[0].startswith("JAX_PROCESS_ID=1: two processes have it, pid ")
  assert told == [told[0]] * 3
  assert seconds < 5


@pytest.mark.parametrize("counts", [(3, 2), (2, 3), (2, 3, 3)])
def test_another_number_of_processes(counts, monkeypatch):
  monkeypatch.setattr(handshake, "LINGER_SECONDS", 1.0)
  told, seconds = meet(*[SAME] * len(counts), counts=counts, delay=0.1)
  line = (
    f"the processes differ: JAX_NUM_PROCESSES ({counts[0]} in process 0, {counts[1]} "
  )
  assert told[0].startswith(line)
  assert told == [told[0]] * len(counts)
  assert seconds < 5


def test_one_that_never_comes():
  told, seconds = meet(SAME, SAME, count=3, limit=1.0)
  assert told[0].startswith("process 2 of 3 did not come to 127.0.0.1:")
  assert told[0].endswith(" within 1 s; see --peer_timeout")
  assert told[1] == told[0]
  assert seconds < 10


def test_process_0_never_comes():
  told, seconds = meet(SAME, count=2, indices=[1], limit=1.0)
  assert "process 0 does not answer within 1 s (Connection refused)" in told[0]
  assert seconds < 10


def test_a_port_that_is_taken(monkeypatch):
  monkeypatch.setattr(handshake, "GREETING_SECONDS", 0.5)
  with socket.create_server(("127.0.0.1", 0)) as server:
    told, _ = meet(SAME, SAME, port=server.getsockname()[1], limit=1.0)
  assert "cannot be used (Address already in use); is another job" in told[0]
  assert "what listens there is no process that waits for others" in told[1]


@pytest.mark.parametrize(
  "address", ["", "nowhere", "host:", ":12", "host:0", "h:70000"]
)
def test_an_address_that_is_none(address):
  place = handshake.Place(address, 2, 1)
  with pytest.raises(UserError, match="must be host:port, with a port from 1 to 65535"):
    handshake.meet(place, SAME, 1.0)


def test_a_stranger_at_the_port_of_process_0_is_ignored():
  port = free_port()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    told = pool.submit(meet, SAME, SAME, port=port, delay=1.0)
    time.sleep(0.4)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
      stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
      assert told.result(timeout=30)[0] == ["", ""]
