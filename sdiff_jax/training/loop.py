"""The training loop: one fixed order, and no waiting for the device in it."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.training.metric_writer import Writer
from sdiff_jax.training.state import TrainState
from sdiff_jax.types import Array, UserError


def run(
  step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]],
  state: TrainState,
  batches: Iterator[Any],
  writer: Writer,
  checkpoints: Checkpoints,
  *,
  start: int,
  steps: int,
  batch_size: int,
  log_every: int,
  save_every: int,
  sample_every: int,
  sample: Callable[[TrainState], np.ndarray],
  skip_nonfinite: bool,
  stopping: Callable[[int], bool],
  seconds: float = 0.0,
) -> TrainState:
  """Trains from step `start` to `steps`, and saves a checkpoint at the end.

  In each turn: take a batch, start the step, and only then, while it runs, write
  what the steps before it measured; then save, then sample. Metrics are means over
  `log_every` steps and are read one step late, so the device never waits for them.

  Args:
    step: compiled step (state, batch) -> (state, metrics); the state is donated.
    state: state after `start` steps.
    batches: device batches start, start + 1, ...
    writer: where metrics go.
    checkpoints: where states go.
    start: steps taken already.
    steps: steps in all.
    batch_size: images a step.
    log_every: steps between lines of metrics.
    save_every: steps between checkpoints.
    sample_every: steps between sample grids, 0 for none.
    sample: state -> picture uint8 [H, W, C].
    skip_nonfinite: go on after steps that were not finite (see `step`).
    stopping: steps taken -> whether to save and return before the end.
    seconds: training time before `start`.

  Returns:
    The last state. The metrics' `seconds` are training time without grids.

  Raises:
    UserError: the loss or its gradient was not finite; no state of it was saved.
  """
  recent: list[dict[str, Array]] = []
  logged = [start, seconds]
  clock = time.perf_counter() - seconds

  def read() -> list[dict[str, np.ndarray]]:
    host = jax.device_get(recent)
    bad = [i for i, metrics in enumerate(host) if metrics["skipped"]]
    if bad and not skip_nonfinite:
      raise UserError(
        f"step {logged[0] + bad[0] + 1}: the loss or its gradient is not finite; the "
        f"last good checkpoint is that of step {checkpoints.latest}; go on without "
        "such steps by config.train.skip_nonfinite=True, or train anew with a lower "
        "config.optim.learning_rate"
      )
    return host

  def log(done: int) -> None:
    host = read()
    means = jax.tree.map(lambda *a: float(np.mean(a)), *host)
    now = time.perf_counter() - clock
    rate = (done - logged[0]) * batch_size / max(now - logged[1], 1e-9)
    writer.scalars(done, means | {"images_per_second": rate, "seconds": now})
    writer.progress(done, images_per_second=rate, loss=means["loss"])
    recent.clear()
    logged[:] = [done, now]

  for done in range(start, steps):
    batch = next(batches)
    state, metrics = step(state, batch)
    if recent and done % log_every == 0:
      log(done)
    recent.append(metrics)
    if stopping(done + 1):
      steps = done + 1
      break
    if (done + 1) % save_every == 0 and done + 1 < steps:
      read()  # what is saved is good
      checkpoints.save(done + 1, state)
    if sample_every and (done + 1) % sample_every == 0:
      pause = time.perf_counter()
      writer.image(done + 1, "grid", sample(state))
      clock += time.perf_counter() - pause
  if recent:
    log(steps)
  if start < steps:
    checkpoints.save(steps, state)
    checkpoints.wait()
  return state
