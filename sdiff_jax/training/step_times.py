"""Times of steps, measured without making the loop wait for the devices."""

import queue
import threading
import time

import jax
import numpy as np

from sdiff_jax.types import Metrics


class StepTimes:
  """Durations of steps, as a context manager.

  A thread waits for the metrics of each step and notes the time.

  Example:
    >>> with StepTimes() as times:
    ...   times.add({"loss": jax.numpy.ones(())})
    ...   len(times.take())
    1
  """

  def __init__(self) -> None:
    self._started: queue.Queue[Metrics | None] = queue.Queue()
    self._durations: list[float] = []
    self._last = time.perf_counter()
    self._thread = threading.Thread(target=self._watch, daemon=True, name="step times")

  def __enter__(self) -> "StepTimes":
    self._last = time.perf_counter()
    self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._started.put(None)
    self._thread.join()

  def add(self, metrics: Metrics) -> None:
    """Notes that a step was started, whose metrics these are."""
    self._started.put(metrics)

  def pause(self) -> None:
    """Leaves out the time since the last step: the devices did something else."""
    self._started.join()
    self._last = time.perf_counter()

  def take(self) -> np.ndarray:
    """Returns the durations of the steps since the last call, s; waits for them."""
    self._started.join()
    durations, self._durations = self._durations, []
    return np.array(durations)

  def _watch(self) -> None:
    """Waits for one step after the other."""
    while (metrics := self._started.get()) is not None:
      try:
        jax.block_until_ready(metrics)
        now = time.perf_counter()
        self._durations.append(now - self._last)
        self._last = now
      except Exception:  # the loop meets it as well, and reports it
        pass
      finally:
        self._started.task_done()


def peak_memory() -> float | None:
  """Returns the largest number of bytes in use so far on a device of this process.

  None where the devices do not tell, as CPUs.

  Example:
    >>> peak_memory() is None
    True
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return float(max(peaks)) if peaks else None
