"""The training loop: a fixed order of events that never waits for the device."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.training.metric_writer import Writer
from sdiff_jax.training.state import TrainState
from sdiff_jax.types import Batch, Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopOptions:
  """How long a run is, and how often it reports.

  Attributes:
    steps: number of steps in total.
    batch_size: images of a step, for the throughput.
    log_every: steps between two lines of metrics.
    save_every: steps between two checkpoints.
    sample_every: steps between two sample grids, 0 for none.
    skip_nonfinite: whether to continue after steps whose loss or gradient is not finite
      (see `step.build`).

  Example:
    >>> LoopOptions(steps=1000, batch_size=128).log_every
    50
  """

  steps: int
  batch_size: int
  log_every: int = 50
  save_every: int = 1000
  sample_every: int = 0
  skip_nonfinite: bool = False


def run(
  step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
  state: TrainState,
  batches: Iterator[Batch],
  writer: Writer,
  checkpoints: Checkpoints,
  options: LoopOptions,
  *,
  start: int = 0,
  sample: Callable[[TrainState], np.ndarray | None] | None = None,
  stopping: Callable[[int], bool] = lambda steps: False,
  seconds: float = 0.0,
) -> TrainState:
  """Trains from step `start` to `options.steps`, and saves a checkpoint at the end.

  Each iteration gets a batch, starts the step and, while the step runs, writes the
  metrics of the steps before it; then it saves, then it samples. Metrics are means over
  `log_every` steps and are read one step late, so the device never waits for them.

  Args:
    step: compiled step (state, batch) -> (state, metrics); the state is donated.
    state: state after `start` steps.
    batches: batches start, start + 1, ... on the device.
    writer: writes the metrics.
    checkpoints: writes the states.
    options: length and intervals.
    start: number of steps so far.
    sample: state -> picture, uint8 [H, W, C], or None for none; needed if `sample_every`
      is not 0.
    stopping: number of steps -> whether to save and return before the end.
    seconds: training time before `start`, s.

  Returns:
    The last state. The metric "seconds" is the training time without sample grids.

  Raises:
    ValueError: there is no `sample` for the grids.
    FloatingPointError: the loss or its gradient was not finite; no state of that step
      was saved.
  """
  if options.sample_every and sample is None:
    raise ValueError("sample: needed for sample grids every sample_every steps")
  steps = options.steps
  recent: list[Metrics] = []
  logged = [start, seconds]
  clock = time.perf_counter() - seconds

  def read() -> list[dict[str, np.ndarray]]:
    host: list[dict[str, np.ndarray]] = jax.device_get(recent)
    skipped = [i for i, metrics in enumerate(host) if metrics["skipped"]]
    if skipped and not options.skip_nonfinite:
      raise FloatingPointError(
        f"step {logged[0] + skipped[0] + 1}: the loss or its gradient is not finite; "
        f"the last good checkpoint is that of step {checkpoints.latest}"
      )
    return host

  def log(done: int) -> None:
    host = read()
    means = jax.tree.map(lambda *a: float(np.mean(a)), *host)
    now = time.perf_counter() - clock
    rate = (done - logged[0]) * options.batch_size / max(now - logged[1], 1e-9)
    writer.scalars(done, means | {"images_per_second": rate, "seconds": now})
    writer.progress(done, images_per_second=rate, loss=means["loss"])
    recent.clear()
    logged[:] = [done, now]

  for done in range(start, steps):
    batch = next(batches)
    state, metrics = step(state, batch)
    if recent and done % options.log_every == 0:
      log(done)
    recent.append(metrics)
    if stopping(done + 1):
      steps = done + 1
      break
    if (done + 1) % options.save_every == 0 and done + 1 < steps:
      read()  # checks that the state to save is finite
      checkpoints.save(done + 1, state)
    if sample and options.sample_every and (done + 1) % options.sample_every == 0:
      pause = time.perf_counter()
      picture = sample(state)
      if picture is not None:
        writer.image(done + 1, "grid", picture)
      clock += time.perf_counter() - pause
  if recent:
    log(steps)
  if start < steps:
    checkpoints.save(steps, state)
    checkpoints.wait()
  return state
