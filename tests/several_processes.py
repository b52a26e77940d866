"""A command as several processes, which talk over 127.0.0.1."""

import socket

import forked
from command_line import environment


def free_address() -> str:
  """Returns an address of this machine at which nobody listens."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


def start(
  cache, *args: str, count: int = 2, more=(), script: str = forked.COMMAND
) -> list[forked.Process]:
  """Starts a command as some processes with eight devices, each with arguments of its own."""
  names = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": str(count)}
  env = environment(cache, 8 // count) | names
  return [
    forked.start(*args, *own, env=env | {"JAX_PROCESS_ID": str(i)}, script=script)
    for i, own in enumerate(more or [()] * count)
  ]
