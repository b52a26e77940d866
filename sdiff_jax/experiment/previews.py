"""Grids and metrics of samples, which a network makes while it is trained."""

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_collections
import numpy as np

from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import evaluation, pipelines, prompts, sampling
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.io import image_io
from sdiff_jax.metrics.statistics import streaming
from sdiff_jax.training.state import TrainState
from sdiff_jax.types import UserError

# (state, number of samples, samples of a batch) -> batches of images uint8 [n, H, W, C].
Images = Callable[[TrainState, int, int], Iterator[np.ndarray]]


class Previews(NamedTuple):
  """What is made of samples by the first average of a state.

  If samples are not finite, or cannot be measured, stderr says so and training goes on:
  the average may recover.

  Attributes:
    sample: state -> a grid, uint8 [H, W, C], or None; None for no grids.
    evaluate: state -> values of metrics by name; None for no metrics.
  """

  sample: Callable[[TrainState], np.ndarray | None] | None = None
  evaluate: Callable[[TrainState], dict[str, float]] | None = None


def build(config: ml_collections.ConfigDict, experiment: Experiment) -> Previews:
  """Returns the grids of `train.sample_every` and the metrics of `train.evaluate_every`.

  Args:
    config: of the run; the metrics are those of `evaluate`, the sampler `sampler`.
    experiment: its pieces.

  Raises:
    UserError: the samples of such data are no images, or there is nothing to measure.
  """
  train = config.train
  if not train.sample_every and not train.evaluate_every:
    return Previews()
  sampling.check_images(experiment)
  sampler = sampling.build_sampler(config).sequential()
  pipeline = sampling.pipeline(config, experiment)
  measure = _measure(config, experiment) if train.evaluate_every else None
  compiled = pipelines.batch_sampler(pipeline, sampler)
  profile = config.ema.profiles[0]

  def images(state: TrainState, num: int, batch_size: int) -> Iterator[np.ndarray]:
    params = state.ema[profile]
    batches = pipelines.batches(pipeline, compiled, params, num, batch_size)
    return (images for images, _ in batches)

  return Previews(
    _grid_fn(experiment, images) if train.sample_every else None,
    _metrics_fn(config, measure, images) if measure else None,
  )


def _measure(
  config: ml_collections.ConfigDict, experiment: Experiment
) -> evaluation.MetricFn:
  """Returns the metrics of `evaluate`, after checks of its fields."""
  section, mesh = config.evaluate, experiment.mesh
  if not section.features and not section.clip:
    raise UserError(
      f"config.train.evaluate_every={config.train.evaluate_every}: needs "
      "config.evaluate.features or config.evaluate.clip"
    )
  sampling.check_request(config, experiment, section.num)
  with config_errors("config.evaluate"):
    sharding.check_batch(section.batch_size, sharding.samples(mesh))
  return evaluation.metric_fn(
    config,
    mesh,
    evaluation.real(config) if section.features else None,
    sampling.image_shape(experiment),
    prompts.of_samples(config),
  )


def _grid_fn(
  experiment: Experiment, images: Images
) -> Callable[[TrainState], np.ndarray | None]:
  """Returns state -> a grid of samples, None if they are not finite."""
  num, columns = sampling.grid_size(experiment)
  batch_size = -(-num // experiment.mesh.size) * experiment.mesh.size

  def sample(state: TrainState) -> np.ndarray | None:
    try:
      return image_io.grid(next(images(state, num, batch_size)), columns)
    except UserError as error:
      print(f"step {int(state.step)}: {error}", file=sys.stderr)
      return None

  return sample


def _metrics_fn(
  config: ml_collections.ConfigDict, measure: evaluation.MetricFn, images: Images
) -> Callable[[TrainState], dict[str, float]]:
  """Returns state -> values of metrics, {} if samples cannot be measured."""
  num, batch_size = config.evaluate.num, config.evaluate.batch_size

  def evaluate(state: TrainState) -> dict[str, float]:
    def batches(start: int) -> Iterator[streaming.Images]:
      del start  # there is no state of an earlier run
      return map(evaluation.array_images, images(state, num, batch_size))

    try:
      return measure(batches, num)
    except UserError as error:
      print(f"step {int(state.step)}: {error}", file=sys.stderr)
      return {}

  return evaluate
