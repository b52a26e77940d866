"""Training steps of configs on this accelerator, beside the modeled time.

  python benchmarks/hardware.py configs/imagenet512_diffusion.py:S \
    [configs/imagenet512_scd.py:S] [--batch=32] [--rows=1,8,16,48] [--chip=h100]

Networks have the size and the types of their configs (bfloat16 for float16); the data
are noise. A step is timed with its state donated, as in training. Calls of the first
network are timed at several batch sizes: the cost of a parallel sampler's iteration.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from sdiff_jax import config as config_lib
from sdiff_jax.capacity import chips
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import programs, sampling
from sdiff_jax.experiment import training as training_lib

REPEATS = 20


def load(file: str, batch: int) -> tuple[Any, experiments.Experiment]:
  """Returns an experiment of a config's network; its source has no images."""
  config = config_lib.load(file, f"{file}: no such file")
  config.train.batch_size = batch
  if config.model.get("dtype") == "float16":
    config.model.dtype = "bfloat16"
  config = experiments.model_variant(config, "unrolled")
  source, mesh = programs.abstract_dataset(config), sharding.make_mesh()
  network = experiments.network(config, source)
  return config, experiments.Experiment(source, network, mesh, config.sigma_d)


def median(call: Callable[[], Any]) -> float:
  """Returns the time of a call, seconds; the first two are not counted."""
  taken = []
  for _ in range(REPEATS + 2):
    begin = time.perf_counter()
    jax.block_until_ready(call())
    taken.append(time.perf_counter() - begin)
  return statistics.median(taken[2:])


def noise(shapes: Any) -> Any:
  """Returns arrays: standard normal ones, and integers of 0."""
  return jax.tree.map(
    lambda s: (
      jax.random.normal(jax.random.key(1), s.shape, s.dtype)
      if jnp.issubdtype(s.dtype, jnp.floating)
      else jnp.zeros(s.shape, s.dtype)
    ),
    shapes,
  )


def training(config, experiment: experiments.Experiment) -> tuple[float, float, float]:
  """Returns seconds of a step, the model's operations in it, and the most bytes."""
  source, network, mesh = experiment.dataset, experiment.network, experiment.mesh
  teacher, shapes = programs.abstract_teacher(config, source)
  key = jax.random.key(0)
  frozen = shapes and jax.jit(teacher.init)(key)
  trainer = training_lib.build_trainer(config, network, teacher, mesh)
  state = trainer.init(key)
  batch = noise(training_lib.batch_shapes(source, config.train.batch_size))
  compiled = trainer.lower(state, batch, key, frozen).compile()

  def call() -> Any:
    nonlocal state
    state, metrics = compiled(state, batch, key, frozen)
    return metrics

  memory = compiled.memory_analysis()
  most = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  return median(call), programs.training(config, experiment).flops(False), most


def rows(
  experiment: experiments.Experiment, counts: list[int]
) -> Iterator[tuple[int, float]]:
  """Yields batch sizes and the seconds of a call of the network with such a batch."""
  params = jax.jit(experiment.network.init)(jax.random.key(0))

  @jax.jit
  def call(params: Any, x: Any, t: Any, label: Any) -> Any:
    return sampling.denoiser(experiment, params)(x, t, {"label": label})

  for n in counts:
    x = jax.random.normal(jax.random.key(0), (n, *experiment.dataset.shape))
    given = params, x, jnp.linspace(0.1, 1.5, n), jnp.zeros(n, jnp.int32)
    yield n, median(lambda given=given: call(*given))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("configs", nargs="+")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--rows", default="1,8,16,48,80")
  parser.add_argument("--chip", choices=[*chips.CHIPS], default="h100")
  given = parser.parse_args()
  peak, kind = chips.CHIPS[given.chip].peak, jax.devices()[0].device_kind
  print(f"{kind}, jax {jax.__version__}, batch {given.batch}")
  for file in given.configs:
    config, experiment = load(file, given.batch)
    taken, flops, most = training(config, experiment)
    print(
      f"{file}: {1e3 * taken:.1f} ms a step, {given.batch / taken:,.0f} images/s, "
      f"{flops / 1e12:.2f} TFLOP, {1e3 * flops / peak:.1f} ms at the peak, "
      f"{flops / peak / taken:.1%} of it, {most / 1e9:.1f} GB",
      flush=True,
    )
  _, experiment = load(given.configs[0], given.batch)
  for n, taken in rows(experiment, [int(n) for n in given.rows.split(",")]):
    print(
      f"  batch {n}: {1e3 * taken:.2f} ms, {1e3 * taken / n:.3f} ms a sample",
      flush=True,
    )


if __name__ == "__main__":
  main()
