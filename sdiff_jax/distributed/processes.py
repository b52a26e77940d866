"""Several processes that run one job, on a pod, a cluster or one machine."""

import contextlib
import hashlib
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from sdiff_jax.distributed import handshake, peers, signals
from sdiff_jax.types import Json, UserError

HEARTBEAT = 45  # seconds without a heartbeat until a process counts as dead
# Longest time that a process which has finished waits for the others, s: process 0 may
# still write for hours. One that dies meanwhile is noticed by its heartbeat.
SHUTDOWN = 24 * 3600
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LIMIT = 300.0  # seconds to wait for the other processes, unless told otherwise

# Whether this is process 0 -> what must be equal in all processes (see `handshake.meet`).
Describe = Callable[[bool], Mapping[str, Json]]


def place() -> handshake.Place | None:
  """Returns the place of this process as environment variables give it, or None.

  Raises:
    UserError: only some of the variables are set, or two of them are not numbers.
  """
  address, count, index = (os.environ.get(name) for name in VARIABLES)
  if count is None and index is None:
    return None
  if address is None or not all(n and n.isdecimal() for n in (count, index)):
    values = ", ".join(f"{n}={os.environ.get(n, '')!r}"[:100] for n in VARIABLES)
    raise UserError(f"{values}: set none of them, or an address and two numbers")
  if not int(index) < int(count):
    raise UserError(
      f"{VARIABLES[2]}={index[:20]}: must be from 0 to {VARIABLES[1]} - 1, with "
      f"{VARIABLES[1]}={count[:20]}"
    )
  return handshake.Place(address, int(count), int(index))


def start(describe: Describe = lambda first: {}, limit: float = LIMIT) -> None:
  """Joins the other processes of this job, if there are any.

  On TPU pods, Slurm, Open MPI and Kubernetes JAX detects them. Elsewhere three
  environment variables name them: JAX_COORDINATOR_ADDRESS (host:port of process 0),
  JAX_NUM_PROCESSES and JAX_PROCESS_ID. A process that has used JAX already, such as a
  notebook, runs alone.

  Args:
    describe: returns what must be equal in all processes; called once.
    limit: longest time to wait for the other processes, s.

  Raises:
    UserError: the variables are not valid, or the processes do not fit together.
  """
  own = None
  if not jax.distributed.is_initialized():
    own = place()
    if own is not None and own.count > 1:
      about = {"code version": code_version(), **describe(own.index == 0)}
      peers.watch(handshake.meet(own, about, limit))
    _initialize(own, limit)
    signals.install_after_jax()
  if own is not None and own.count > 1:
    # Gloo waits for no more than 30 s: the processes have just met.
    multihost_utils.sync_global_devices("start")
    return
  # Of a process that runs alone `describe` may still have found a mistake.
  several = jax.distributed.is_initialized() and jax.process_count() > 1
  first = not several or jax.process_index() == 0
  about = {"code version": code_version() if several else "", **describe(first)}
  texts = (
    _gather(json.dumps(about).encode()) if several else [json.dumps(about).encode()]
  )
  descriptions = {k: json.loads(text) for k, text in enumerate(texts)}
  if problem := handshake.verdict(descriptions, len(descriptions)):
    raise handshake.Refused(problem)


def code_version() -> str:
  """Returns a digest of the package's source files and of the version of JAX."""
  root = pathlib.Path(__file__).parents[1]
  digest = hashlib.sha256(jax.__version__.encode())
  for path in sorted(root.rglob("*.py")):
    digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
  return digest.hexdigest()[:12]


def _initialize(own: handshake.Place | None, limit: float) -> None:
  """Connects this process to JAX's coordinator, if there is one."""
  address, options = os.environ.get(VARIABLES[0]), {}
  if own is not None:
    options = {"num_processes": own.count, "process_id": own.index}
  try:
    jax.distributed.initialize(
      **options,
      initialization_timeout=max(1, int(limit)),
      heartbeat_timeout_seconds=HEARTBEAT,
      shutdown_timeout_seconds=SHUTDOWN,
    )
  except (ValueError, IndexError) as error:  # IndexError: an address without a port
    if address is not None:
      raise UserError(f"{VARIABLES[0]}={address[:100]!r}: {error}") from error
    # There is no cluster: this process runs alone.
  except RuntimeError:
    if address is not None:
      raise
    # JAX is in use already.


def gather(numbers: np.ndarray) -> np.ndarray:
  """Returns the numbers [n] of all processes, float64 [P, n]; waits for all of them.

  Example:
    >>> gather(np.array([1.5, 2.0]))
    array([[1.5, 2. ]])
  """
  if jax.process_count() == 1:
    return numbers[None]
  # In 32 bits JAX would round them.
  parts = multihost_utils.process_allgather(numbers.view(np.uint32))
  return np.asarray(parts).reshape(jax.process_count(), -1).view(np.float64)


def _gather(text: bytes) -> list[bytes]:
  """Returns the texts of all processes, in their order."""
  own = np.frombuffer(text, np.uint8)
  sizes = multihost_utils.process_allgather(np.array([len(own)], np.int32))
  sizes = np.asarray(sizes).ravel()
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(own)] = own
  rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
  return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def refuse(problem: str, limit: float) -> None:
  """Tells the other processes of a mistake that this one has found before `start`.

  Args:
    problem: the message.
    limit: longest time to wait for the other processes, s.
  """
  with contextlib.suppress(UserError):
    own = place()
    if own is not None and own.count > 1 and not jax.distributed.is_initialized():
      handshake.meet(own, {handshake.PROBLEM: problem}, limit)


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


def leave() -> None:
  """Waits until all processes have come here, and ends their connection."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[int], bool]]:
  """Yields step -> whether to stop after that step, because of a signal.

  Several processes all stop after the same step, whichever of them received the signal.
  `multihost_utils.reached_preemption_sync_point` is the only interface of JAX to that
  agreement.
  """
  with signals.stopping() as received:
    if jax.process_count() > 1:

      def stop(step: int) -> bool:
        return multihost_utils.reached_preemption_sync_point(step) and signals.saving()

      yield stop
    else:
      yield lambda step: received()
