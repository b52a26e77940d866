"""Fraction of the training time that is not the step: data, metrics, checkpoints.

  python benchmarks/loop_overhead.py [--rounds=24] [--config=FILE --chunk=STEPS]

Runs `loop.run` as training does, with the config's data, real metrics, progress and
checkpoints, and no sample grids. After every `chunk` steps the loop is paused, and the
compiled step alone is called as often on one batch that stays on the device: loop and
step are timed alternately, on a machine that others may share. Metrics are written once
a chunk, which is at least as often as the config says. A save starts in the middle of
every other chunk and is awaited at its end; the fraction at the config's own interval
between checkpoints follows from the chunks with and without one. The second line of a
config is the processor time of all threads, which other work on the machine disturbs
less, and in which nothing is hidden behind the step.
"""

import argparse
import runpy
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from sdiff_jax import data
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import training
from sdiff_jax.training import loop, metric_writer, state
from sdiff_jax.training.checkpoints import Checkpoints

# Steps a chunk: some seconds.
CHUNKS = {"configs/fashion_diffusion.py": 10, "configs/digits_diffusion.py": 100}
PAUSE = 0.5  # seconds: the pipeline reads ahead first, which is not the bare step's


def training_step(config, experiment: experiments.Experiment) -> tuple:
  """Returns the compiled step, and a function that returns a first state."""
  mesh, size = experiment.mesh, config.train.batch_size
  trainer = training.build_trainer(config, experiment.network, None, mesh)
  everywhere = sharding.replicated(mesh)
  key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=everywhere)()
  batch = training.batch_shapes(experiment.dataset, size)
  step = trainer.lower(trainer.abstract_state(), batch, key).compile()
  return lambda state, batch: step(state, batch, key, None), lambda: trainer.init(key)


def device_batches(config, experiment: experiments.Experiment) -> Iterator[Any]:
  """Yields what the training job yields to its loop."""
  over_batch = sharding.batch(experiment.mesh)
  size = config.train.batch_size
  batches = data.batches(
    experiment.dataset,
    seed=config.seed,
    batch_size=size,
    sigma_d=config.sigma_d,
    flip=config.train.flip,
    rows=sharding.rows(over_batch, size),
  )
  return (sharding.make_global_batch(batch, over_batch, size) for batch in batches)


def clocks() -> np.ndarray:
  """Returns the seconds of the wall clock and of all threads on processors."""
  return np.array([time.perf_counter(), time.process_time()])


class Turns:
  """Holds the loop between two of its batches, to time the bare step."""

  def __init__(self, train_step: Any, bare: Any, batch: Any, chunk: int, saver: Any):
    self._step, self._bare, self._batch = train_step, bare, batch
    self._chunk, self._saver = chunk, saver
    self._last = None  # metrics of the loop's newest step
    self.seconds: list[tuple[np.ndarray, np.ndarray]] = []  # of loop and bare step

  def step(self, current: state.TrainState, batch: Any) -> tuple:
    current, self._last = self._step(current, batch)
    return current, self._last

  def batches(self, source: Iterator[Any], chunks: int) -> Iterator[Any]:
    """Yields the batches of so many chunks, and times the bare step after each."""
    for _ in range(chunks):
      begin = clocks()
      for _ in range(self._chunk):
        yield next(source)
      jax.block_until_ready(self._last)
      self._saver.wait()
      spent = clocks() - begin
      time.sleep(PAUSE)
      self.seconds.append((spent, self._bare_seconds()))
    yield next(source)  # of a last step, so that the loop asks once more

  def _bare_seconds(self) -> np.ndarray:
    begin = clocks()
    for _ in range(self._chunk):
      self._bare, metrics = self._step(self._bare, self._batch)
    jax.block_until_ready(metrics)
    return clocks() - begin


def measure(
  config: ml_collections.ConfigDict, chunk: int, rounds: int
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns clocks of loop and bare step of every chunk; odd ones have a save."""
  experiment = experiments.build(config)
  train_step, start = training_step(config, experiment)
  source = device_batches(config, experiment)
  bare = start()
  for _ in range(5):
    bare, _ = train_step(bare, next(source))
  # From half a chunk on, multiples of two chunks lie in the middle of odd chunks.
  first = chunk // 2
  last = first + chunk * rounds + 1
  with (
    tempfile.TemporaryDirectory() as workdir,
    Checkpoints(workdir, keep=config.checkpoint.keep) as checkpoints,
    metric_writer.Writer(workdir, total=last) as metrics,
  ):
    turns = Turns(train_step, bare, next(source), chunk, checkpoints)
    loop.run(
      turns.step,
      start(),
      turns.batches(source, rounds),
      metrics,
      checkpoints,
      loop.LoopOptions(
        steps=last,
        batch_size=config.train.batch_size,
        log_every=min(chunk, config.train.log_every),
        save_every=2 * chunk,
        skip_nonfinite=config.train.skip_nonfinite,
      ),
      start=first,
    )
  return turns.seconds


def report(name: str, config: ml_collections.ConfigDict, chunk: int, seconds: list):
  """Prints two rows of the table."""
  every = config.checkpoint.every
  pairs = np.array(seconds)  # [chunks, (loop, bare), clocks]
  shares = 100 * (pairs[:, 0] / pairs[:, 1] - 1)
  without, with_save = (np.median(shares[k::2], 0) for k in (0, 1))
  usual = without + (with_save - without) * chunk / every
  bare = np.median(pairs[:, 1], 0) / chunk * 1e3
  for k, clock in enumerate(("wall clock", "processors")):
    cells = [f"`{name}`, batch {config.train.batch_size}", clock, f"{bare[k]:.1f} ms"]
    cells += [f"{without[k]:+.1f}%", f"{with_save[k]:+.1f}% ({chunk} steps)"]
    print("|", " | ".join([*cells, f"**{usual[k]:+.1f}%** ({every} steps)"]), "|")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--config", help="one config instead of the two")
  parser.add_argument("--chunk", type=int, default=0, help="steps a turn")
  parser.add_argument("--rounds", type=int, default=24, help="turns, half with a save")
  args = parser.parse_args()
  print("| config | clock | bare step | loop | with a save | save as configured |")
  print("|---|---|---|---|---|---|")
  for name in [args.config] if args.config else CHUNKS:
    config = runpy.run_path(name)["get_config"]()
    chunk = args.chunk or CHUNKS.get(name, 25)
    report(name, config, chunk, measure(config, chunk, args.rounds))


if __name__ == "__main__":
  main()
