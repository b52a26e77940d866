"""Puts the requests of many clients into one batch on the device.

A request waits until a batch of its lane is full, or until it has waited `max_wait`
seconds and the device is free. The queue is bounded: what does not fit is refused at
once, with the time after which it would. One thread calls the device; everything else
runs on the event loop.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from sdiff_jax.serving import lanes as lanes_lib
from sdiff_jax.serving.lanes import Lane, Rows

T = TypeVar("T")


class QueueFull(Exception):
  """The queue has no room for a request.

  Attributes:
    retry_after: seconds until it will probably have some.
  """

  def __init__(self, retry_after: float):
    """Stores the time.

    Args:
      retry_after: seconds.
    """
    super().__init__("the queue is full")
    self.retry_after = max(1, math.ceil(retry_after))


class Stopping(Exception):
  """The service stops, and takes no more requests."""


class TooLate(Exception):
  """A request cannot be answered before its deadline."""


class Answer(NamedTuple):
  """The outputs of a request.

  Attributes:
    rows: outputs, [n, ...].
    waited: seconds from the request until its last batch was started.
    seconds: duration of that batch.
    batch: number of rows of that batch that requests asked for.
  """

  rows: Rows
  waited: float
  seconds: float
  batch: int


class Batch(NamedTuple):
  """What metrics are told of a batch.

  Attributes:
    lane: that computed it.
    count: number of rows that requests asked for.
    size: of the compiled program.
    seconds: duration.
  """

  lane: Lane
  count: int
  size: int
  seconds: float


@dataclasses.dataclass(eq=False)
class _Request:
  """A request that waits, of which the first `taken` rows are in batches."""

  rows: Rows
  count: int
  arrival: float
  deadline: float
  future: asyncio.Future
  taken: int = 0
  parts: list[Rows] = dataclasses.field(default_factory=list)


# A request and its rows in a batch.
_Slice = tuple[_Request, Rows]


class Batcher:
  """A bounded queue before the device.

  Attributes:
    waiting: number of rows in the queue.
  """

  def __init__(
    self,
    *,
    max_wait: float,
    max_queue: int,
    on_batch: Callable[[Batch], None] = lambda batch: None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Stores the bounds; `start` begins to work.

    Args:
      max_wait: seconds that a request waits for others while the device is free.
      max_queue: number of rows that may wait.
      on_batch: told of every batch, on the event loop.
      clock: seconds.
    """
    self.waiting = 0
    self._max_wait, self._max_queue = max_wait, max_queue
    self._on_batch, self._clock = on_batch, clock
    self._queues: dict[Lane, collections.deque[_Request]] = {}
    self._counts: collections.Counter[Lane] = collections.Counter()
    self._arrived, self._idle = asyncio.Event(), asyncio.Event()
    self._idle.set()
    self._busy_until = 0.0
    self._stopping = False
    self._task: asyncio.Task | None = None
    self._device = concurrent.futures.ThreadPoolExecutor(1, "device")

  @property
  def is_stopping(self) -> bool:
    """Whether new requests are refused."""
    return self._stopping

  def start(self) -> None:
    """Begins to serve the queue, on the running event loop."""
    self._task = asyncio.get_running_loop().create_task(self._serve())

  def stop(self) -> None:
    """Refuses new requests from now on."""
    self._stopping = True
    self._arrived.set()

  async def drain(self) -> None:
    """Refuses new requests, answers those that wait, and ends the device's thread."""
    self.stop()
    await self._idle.wait()
    if self._task is not None:
      self._task.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await self._task
    self._device.shutdown()

  async def alone(self, call: Callable[[], T]) -> T:
    """Returns call(), made on the device's thread between two batches.

    Raises:
      Stopping: the service stops.
    """
    if self._stopping:
      raise Stopping
    return await asyncio.get_running_loop().run_in_executor(self._device, call)

  def seconds_until_answer(self, lane: Lane) -> float:
    """Returns an estimate of the time of a request of one row that arrives now."""
    now = self._clock()
    others = [(k, v) for k, v in self._counts.items() if v and k is not lane]
    start = max(self._busy_until - now, 0) + sum(_seconds(*other) for other in others)
    return max(start, self._max_wait) + _seconds(lane, self._counts[lane] + 1)

  async def submit(self, lane: Lane, rows: Rows, deadline: float = math.inf) -> Answer:
    """Returns the outputs of a lane for some rows.

    Args:
      lane: the function.
      rows: its inputs, [n, ...].
      deadline: time of the clock until which the answer must be there.

    Raises:
      QueueFull: there is no room in the queue.
      Stopping: the service stops.
      TooLate: the answer cannot be there in time.
    """
    count, now = lanes_lib.num_rows(rows), self._clock()
    if self._stopping:
      raise Stopping
    if self.waiting + count > self._max_queue:
      raise QueueFull(self.seconds_until_answer(lane))
    if now + self.seconds_until_answer(lane) > deadline:
      raise TooLate
    future = asyncio.get_running_loop().create_future()
    request = _Request(rows, count, now, deadline, future)
    self._queues.setdefault(lane, collections.deque()).append(request)
    self._counts[lane] += count
    self.waiting += count
    self._idle.clear()
    self._arrived.set()
    return await future

  async def _serve(self) -> None:
    """Takes batches from the queue until it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
      lane = self._oldest()
      if lane is None:
        self._idle.set()
        await self._wait(None)
        continue
      left = self._queues[lane][0].arrival + self._max_wait - self._clock()
      if left > 0 and self._counts[lane] < lane.sizes[-1] and not self._stopping:
        await self._wait(left)
        continue
      slices = self._take(lane)
      if not slices:
        continue
      rows = _joined([rows for _, rows in slices])
      count = lanes_lib.num_rows(rows)
      begin = self._clock()
      self._busy_until = begin + _seconds(lane, count)
      try:
        outputs = await loop.run_in_executor(self._device, lane, rows)
      except Exception as error:  # of the device; the service goes on
        for request, _ in slices:
          _fail(request, error)
        continue
      seconds = self._clock() - begin
      size = lanes_lib.fitting(lane.sizes, count)
      self._on_batch(Batch(lane, count, size, seconds))
      self._distribute(slices, outputs, begin, seconds, count)

  async def _wait(self, seconds: float | None) -> None:
    """Waits for a request to arrive, or so many seconds."""
    self._arrived.clear()
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(seconds):
        await self._arrived.wait()

  def _oldest(self) -> Lane | None:
    """Returns the lane whose first request has waited longest, None if none waits."""
    for lane, queue in self._queues.items():
      while queue and queue[0].future.done():  # its client has gone
        self._leave(lane, queue.popleft())
    lanes = [lane for lane, queue in self._queues.items() if queue]
    return min(lanes, key=lambda lane: self._queues[lane][0].arrival, default=None)

  def _leave(self, lane: Lane, request: _Request) -> None:
    """Subtracts the rows of a request that is not to be computed any more."""
    self._counts[lane] -= request.count - request.taken
    self.waiting -= request.count - request.taken

  def _take(self, lane: Lane) -> list[_Slice]:
    """Takes the rows of the next batch from the queue of a lane, the oldest first."""
    queue, slices = self._queues[lane], list[_Slice]()
    free = lanes_lib.best_size(lane.seconds, self._counts[lane])
    while queue and free:
      request = queue[0]
      late = self._clock() + _seconds(lane, 1) > request.deadline
      if late:
        _fail(request, TooLate())
      if request.future.done():
        self._leave(lane, queue.popleft())
        continue
      count = min(free, request.count - request.taken)
      rows = slice(request.taken, request.taken + count)
      slices.append((request, {k: v[rows] for k, v in request.rows.items()}))
      request.taken += count
      free -= count
      self._counts[lane] -= count
      self.waiting -= count
      if request.taken == request.count:
        queue.popleft()
    return slices

  def _distribute(
    self, slices: list[_Slice], outputs: Rows, begin: float, seconds: float, batch: int
  ) -> None:
    """Gives the outputs of a batch to its requests."""
    first = 0
    for request, rows in slices:
      last = first + lanes_lib.num_rows(rows)
      request.parts.append({k: v[first:last] for k, v in outputs.items()})
      first = last
      if request.taken < request.count or request.future.done():
        continue
      if sum(map(lanes_lib.num_rows, request.parts)) < request.count:
        continue
      if self._clock() > request.deadline:
        _fail(request, TooLate())
        continue
      waited = begin - request.arrival
      answer = Answer(_joined(request.parts), waited, seconds, batch)
      request.future.set_result(answer)


def _fail(request: _Request, error: Exception) -> None:
  if not request.future.done():
    request.future.set_exception(error)


def _joined(parts: list[Rows]) -> Rows:
  """Returns the rows of several parts, one after the other."""
  if len(parts) == 1:
    return parts[0]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _seconds(lane: Lane, count: int) -> float:
  """Returns the time that a lane needs for so many rows."""
  batches, top = 0.0, lane.sizes[-1]
  while count > top:
    batches, count = batches + lane.seconds[top], count - top
  return batches + lane.seconds[lanes_lib.fitting(lane.sizes, count)]
