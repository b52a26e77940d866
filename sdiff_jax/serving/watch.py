"""The passes of a parallel sampler as server-sent events, and the race beside them.

First the parallel sampler computes the image, then the sequential one, each alone on the
device. Every pass is an event with the window, the time since the start, and a preview.
"""

import asyncio
import base64
import statistics
import time
from collections.abc import AsyncIterator

import numpy as np

from sdiff_jax.io import image_io
from sdiff_jax.serving import answers
from sdiff_jax.serving.batcher import Batcher, QueueFull
from sdiff_jax.serving.lanes import Rows
from sdiff_jax.serving.models import Model
from sdiff_jax.types import Json

MAX_WATCHERS = 4
NUM_TIMED = 5  # calls without previews, whose median is told


class Watcher:
  """Streams of passes, of which a few may run at a time."""

  def __init__(self, batcher: Batcher):
    """Stores the batcher.

    Args:
      batcher: whose device is used between two batches.
    """
    self._batcher, self._running = batcher, 0

  async def events(self, model: Model, rows: Rows) -> AsyncIterator[bytes]:
    """Returns the events of an image; the stream begins once there is room.

    Args:
      model: with a sampler to be watched.
      rows: inputs of one row.

    Raises:
      QueueFull: too many images are watched already.
    """
    if self._running >= MAX_WATCHERS:
      raise QueueFull(2.0)
    self._running += 1
    try:
      async for event in self._race(model, rows):
        yield event
    finally:
      self._running -= 1

  async def _race(self, model: Model, rows: Rows) -> AsyncIterator[bytes]:
    live = model.live
    guided = "guidance" in rows
    keys = {"parallel": live.key, "sequential": live.sequential}
    keys = {name: key._replace(guided=guided) for name, key in keys.items()}
    yield _event(
      "start",
      {
        "model": model.name,
        "sampler": live.key.sampler,
        "sequential": live.sequential.sampler,
        "window": live.window,
        "steps": live.evaluations,
        "shape": model.shape,
      },
    )
    for name, window in (("parallel", live.window), ("sequential", 1)):
      async for event in self._passes(model, rows, name, window):
        yield event
      lane = model.lanes[keys[name]]
      calls = [await self._batcher.submit(lane, rows) for _ in range(NUM_TIMED)]
      middle = statistics.median(call.seconds for call in calls)
      yield _event("alone", {"mode": name, "ms": 1e3 * middle})
    yield _event("end", {})

  async def _passes(
    self, model: Model, rows: Rows, name: str, window: int
  ) -> AsyncIterator[bytes]:
    """Returns the events of the passes of one sampler, and of its image."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue()
    live, begin = model.live, 0.0

    def listen(first: np.ndarray, denoised: np.ndarray) -> None:
      seconds = time.perf_counter() - begin
      item = (seconds, int(first[0]), denoised.copy())
      loop.call_soon_threadsafe(queue.put_nowait, item)

    def compute() -> tuple[Rows, float]:
      nonlocal begin
      begin = time.perf_counter()
      outputs = live.watch(window, rows, listen)
      return outputs, time.perf_counter() - begin

    task = loop.create_task(self._batcher.alone(compute))
    task.add_done_callback(lambda _: queue.put_nowait(None))
    number = 0
    while (item := await queue.get()) is not None:
      seconds, first, denoised = item
      picture = await asyncio.to_thread(live.pictures, denoised)
      number += 1
      data = {"mode": name, "pass": number, "begin": first, "ms": 1e3 * seconds}
      data["end"] = min(first + window, live.evaluations)
      yield _event("pass", data | {"png": _png(picture[0])})
    outputs, seconds = await task
    cost = {k: int(outputs[k][0]) for k in ("passes", "evaluations")}
    data = {"mode": name, "ms": 1e3 * seconds, **cost}
    if not outputs["finite"][0]:
      yield _event("error", {"mode": name, "message": "the image is not finite"})
      return
    yield _event("done", data | {"png": _png(outputs["images"][0])})


def _png(image: np.ndarray) -> str:
  return base64.b64encode(image_io.png(image)).decode()


def _event(name: str, data: dict[str, Json]) -> bytes:
  return b"event: %s\ndata: %s\n\n" % (name.encode(), answers.encode(data))
