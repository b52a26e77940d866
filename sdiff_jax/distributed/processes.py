"""Several processes that run one job: on a pod, on a cluster, or on one machine."""

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

HEARTBEAT = 30  # seconds without a sign of life until a process counts as dead
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start() -> None:
  """Joins the other processes of this job, where there are any.

  On TPU pods, Slurm, Open MPI and Kubernetes JAX finds them by itself. Elsewhere
  three variables of the environment name them: JAX_COORDINATOR_ADDRESS (host:port of
  process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  Raises:
    UserError: only some of the variables are set, or the numbers are none.
  """
  address, count, mine = (os.environ.get(name) for name in VARIABLES)
  options = {}
  if count is not None or mine is not None:
    if address is None or not all(n and n.isdecimal() for n in (count, mine)):
      found = ", ".join(f"{n}={os.environ.get(n, '')!r}" for n in VARIABLES)
      raise UserError(f"{found}: set none of them, or an address and two numbers")
    options = {"num_processes": int(count), "process_id": int(mine)}
  try:
    jax.distributed.initialize(
      **options,
      heartbeat_timeout_seconds=HEARTBEAT,
      shutdown_timeout_seconds=HEARTBEAT,
    )
  except ValueError as error:
    if address is not None:
      raise UserError(f"{VARIABLES[0]}={address!r}: {error}") from error
    # No cluster here: this process is alone.


def exit_now(code: int) -> None:
  """Ends this process at once where there are others; alone, does nothing.

  The usual end waits for all at a barrier, which those never reach that are waiting
  for this process elsewhere. They notice that it is gone.
  """
  if jax.distributed.is_initialized():
    if code == 1:
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def sigterm() -> Iterator[Callable[[int], bool]]:
  """Gives step -> whether to stop after it, since SIGTERM has come.

  Of several processes all stop after the same step, whichever got the signal. Of one,
  SIGTERM does afterwards what it did before.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  came = threading.Event()
  before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
  try:
    yield lambda step: came.is_set()
  finally:
    signal.signal(signal.SIGTERM, before)
