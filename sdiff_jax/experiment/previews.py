"""Grids of samples, which a network draws while it is trained."""

import sys
from collections.abc import Callable

import ml_collections
import numpy as np

from sdiff_jax.experiment import pipelines, sampling
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.io import image_io
from sdiff_jax.training.state import TrainState
from sdiff_jax.types import UserError


def sample_fn(
  config: ml_collections.ConfigDict, experiment: Experiment
) -> Callable[[TrainState], np.ndarray | None] | None:
  """Returns state -> a grid of samples by its first average, None if there are none.

  The grid is None, and stderr says so, if samples are not finite.

  Args:
    config: of the run; `train.sample_every` is 0 for no grids.
    experiment: its pieces.

  Raises:
    UserError: the samples of such data are no images.
  """
  if not config.train.sample_every:
    return None
  sampling.check_images(experiment)
  sampler = sampling.build_sampler(config).sequential()
  image_pipeline = sampling.pipeline(config, experiment)
  compiled = pipelines.batch_sampler(image_pipeline, sampler)
  profile = config.ema.profiles[0]

  def sample(state: TrainState) -> np.ndarray | None:
    num, columns = sampling.grid_size(experiment)
    batch_size = -(-num // experiment.mesh.size) * experiment.mesh.size
    params = state.ema[profile]
    batches = pipelines.batches(image_pipeline, compiled, params, num, batch_size)
    try:
      return image_io.grid(next(batches)[0], columns)
    except UserError as error:  # training goes on: the average may recover
      print(f"step {int(state.step)}: {error}", file=sys.stderr)
      return None

  return sample
