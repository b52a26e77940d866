"""The training loop: a fixed order of events that never waits for the device."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from sdiff_jax.training import step_times
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.training.goodput import Goodput
from sdiff_jax.training.metric_writer import Writer
from sdiff_jax.training.profiling import Profiler
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
    evaluate_every: steps between two measurements of samples, 0 for none.
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
  evaluate_every: int = 0
  skip_nonfinite: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
  """What a run notes about itself.

  Attributes:
    spent: gets the seconds of checkpoints, sample grids and measurements.
    profiler: traces some steps.
    gather: numbers [n] of this process -> those of all processes [P, n].
  """

  spent: Goodput = dataclasses.field(default_factory=Goodput)
  profiler: Profiler = dataclasses.field(default_factory=lambda: Profiler(""))
  gather: Callable[[np.ndarray], np.ndarray] = lambda numbers: numbers[None]


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
  evaluate: Callable[[TrainState], dict[str, float]] | None = None,
  stopping: Callable[[int], bool] = lambda steps: False,
  seconds: float = 0.0,
  watch: Watch | None = None,
) -> TrainState:
  """Trains from step `start` to `options.steps`, and saves a checkpoint at the end.

  Each iteration gets a batch, starts the step and, while the step runs, writes the
  metrics of the steps before it; then it measures samples, saves, and draws a grid.
  Metrics are means over `log_every` steps and are read one step late, so the device
  never waits for them.

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
    evaluate: state -> values of metrics by name, which the line of that step gets; needed
      if `evaluate_every` is not 0.
    stopping: number of steps -> whether to save and return before the end.
    seconds: training time before `start`, s.
    watch: what the run notes about itself; None for the step times of this process.

  Returns:
    The last state. The metric "seconds" is the training time without what is done with
    samples; the others are explained by `_observed`.

  Raises:
    ValueError: there is no `sample` for the grids, or no `evaluate`.
    FloatingPointError: the loss or its gradient was not finite; no state of that step
      was saved.
  """
  if options.sample_every and sample is None:
    raise ValueError("sample: needed for sample grids every sample_every steps")
  if options.evaluate_every and evaluate is None:
    raise ValueError("evaluate: needed for metrics every evaluate_every steps")
  watch = watch or Watch()
  steps = options.steps
  recent: list[Metrics] = []
  logged = [start, seconds]
  clock = time.perf_counter() - seconds
  waited = 0.0  # for data, since the last line

  def read() -> list[dict[str, np.ndarray]]:
    host: list[dict[str, np.ndarray]] = jax.device_get(recent)
    skipped = [i for i, metrics in enumerate(host) if metrics["skipped"]]
    if skipped and not options.skip_nonfinite:
      raise FloatingPointError(
        f"step {logged[0] + skipped[0] + 1}: the loss or its gradient is not finite; "
        f"the last good checkpoint is that of step {checkpoints.latest}"
      )
    return host

  def log(done: int, measured: Mapping[str, float] | None = None) -> None:
    nonlocal waited
    host = read()
    means = jax.tree.map(lambda *a: float(np.mean(a)), *host)
    now = time.perf_counter() - clock
    rate = (done - logged[0]) * options.batch_size / max(now - logged[1], 1e-9)
    observed = _observed(times.take(), waited, watch.gather)
    means |= {"images_per_second": rate, "seconds": now, **observed}
    writer.scalars(done, means | (measured or {}))
    writer.progress(done, images_per_second=rate, loss=means["loss"])
    recent.clear()
    logged[:], waited = [done, now], 0.0

  @contextlib.contextmanager
  def paused(what: str) -> Iterator[None]:
    nonlocal clock
    jax.block_until_ready(recent)  # the steps so far are training
    begin = time.perf_counter()
    with watch.spent.on(what):
      yield
    clock += time.perf_counter() - begin
    times.pause()

  def due(every: int) -> bool:
    return bool(every) and (done + 1) % every == 0

  with step_times.StepTimes() as times, watch.profiler:
    for done in range(start, steps):
      watch.profiler.before(done + 1, recent[-1:])
      begin = time.perf_counter()
      batch = next(batches)
      wait = time.perf_counter() - begin
      state, metrics = step(state, batch)
      if recent and done % options.log_every == 0:
        log(done)
      recent.append(metrics)
      times.add(metrics)
      waited += wait
      if stopping(done + 1):
        steps = done + 1
        break
      if evaluate and due(options.evaluate_every):
        with paused("evaluate"):
          measured = evaluate(state)
        log(done + 1, measured)
      if due(options.save_every) and done + 1 < steps:
        read()  # checks that the state to save is finite
        if recent and due(options.log_every):
          log(done + 1)  # so that the lines before a checkpoint exist when it does
        writer.flush()
        with watch.spent.on("save"):
          checkpoints.save(done + 1, state)
      if sample and due(options.sample_every):
        with paused("sample"):
          picture = sample(state)
          if picture is not None:
            writer.image(done + 1, "grid", picture)
    if recent:
      log(steps)
  if start < steps:
    with watch.spent.on("save"):
      checkpoints.save(steps, state)
      checkpoints.wait()
  return state


def _observed(
  durations: np.ndarray,
  waited: float,
  gather: Callable[[np.ndarray], np.ndarray],
) -> dict[str, float]:
  """Returns what a line of metrics says of the steps since the last one.

  Args:
    durations: of the steps on this process, s.
    waited: seconds in which this process waited for data.
    gather: see `Watch`.

  Returns:
    "step_seconds": duration of a step, the median over steps and processes;
    "step_seconds_worst": of the longest step of any process; "data_seconds": longest
    wait of a process for data; "peak_memory": bytes, on the fullest device, if known.
  """
  memory = step_times.peak_memory()
  middle, worst = (np.median(durations), durations.max()) if len(durations) else (0, 0)
  every = gather(np.array([middle, worst, waited, memory or 0.0]))
  observed = {
    "step_seconds": float(np.median(every[:, 0])),
    "step_seconds_worst": float(every[:, 1].max()),
    "data_seconds": float(every[:, 2].max()),
  }
  return observed | ({"peak_memory": float(every[:, 3].max())} if memory else {})
