"""Several processes that run one job, on a pod, a cluster or one machine."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from sdiff_jax.types import UserError

HEARTBEAT = 30  # seconds without a heartbeat until a process counts as dead
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start() -> None:
  """Joins the other processes of this job, if there are any.

  On TPU pods, Slurm, Open MPI and Kubernetes JAX detects them. Elsewhere three
  environment variables name them: JAX_COORDINATOR_ADDRESS (host:port of process 0),
  JAX_NUM_PROCESSES and JAX_PROCESS_ID. A process that has used JAX already, such as a
  notebook, runs alone.

  Raises:
    UserError: only some of the variables are set, or two of them are not numbers.
  """
  address, count, index = (os.environ.get(name) for name in VARIABLES)
  options = {}
  if count is not None or index is not None:
    if address is None or not all(n and n.isdecimal() for n in (count, index)):
      values = ", ".join(f"{n}={os.environ.get(n, '')!r}" for n in VARIABLES)
      raise UserError(f"{values}: set none of them, or an address and two numbers")
    options = {"num_processes": int(count), "process_id": int(index)}
  if jax.distributed.is_initialized():
    return
  try:
    jax.distributed.initialize(
      **options,
      heartbeat_timeout_seconds=HEARTBEAT,
      shutdown_timeout_seconds=HEARTBEAT,
    )
  except ValueError as error:
    if address is not None:
      raise UserError(f"{VARIABLES[0]}={address!r}: {error}") from error
    # There is no cluster: this process runs alone.
  except RuntimeError:
    if address is not None:
      raise
    # JAX is in use already.


def exit_now(code: int) -> None:
  """Ends this process at once if several are running; otherwise does nothing.

  The usual exit waits for all processes at a barrier. Processes that wait for this one
  elsewhere never reach that barrier, but they notice that this one has ended.
  """
  if jax.distributed.is_initialized():
    if code == 1:
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def sigterm() -> Iterator[Callable[[int], bool]]:
  """Yields step -> whether to stop after that step, because SIGTERM was received.

  Several processes all stop after the same step, whichever of them received the signal.
  `multihost_utils.reached_preemption_sync_point` is the only interface of JAX to that
  agreement. A single process handles the signal itself, and restores the previous
  handler afterwards.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  received = threading.Event()
  previous = signal.signal(signal.SIGTERM, lambda number, frame: received.set())
  try:
    yield lambda step: received.is_set()
  finally:
    signal.signal(signal.SIGTERM, previous)
