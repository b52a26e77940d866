"""Job `statistics`: computes reference statistics of features, for `evaluate`."""

import os

import jax
import ml_collections

from sdiff_jax import registry
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import evaluation
from sdiff_jax.metrics import frechet
from sdiff_jax.metrics.statistics import reference_statistics
from sdiff_jax.types import UserError


@registry.register("jobs", "statistics")
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes statistics.npz of the images of config.reference, or else of config.data.

  Raises:
    UserError: the data are latents, or a network of evaluate.features takes other
      images or has no Frechet distance.
  """
  if config.evaluate.reference:
    raise UserError(
      "config.evaluate.reference must be empty for --job=statistics, which computes it"
    )
  images = evaluation.real(config)
  mesh, size = experiments.mesh(config), config.evaluate.batch_size
  runs = evaluation.feature_runs(config, mesh, images.shape)
  section = config.reference if config.reference.name else config.data
  settings = {"data": section.to_dict(), "evaluate": config.evaluate.to_dict()}
  settings["digest"] = images.digest().hex()
  statistics = {}
  for run in runs:
    if run.network.metric is not None:
      path = os.path.join(workdir, f"{run.network.metric}.partial.npz")
      state = evaluation.snapshot(path, settings, mesh)
      whole = evaluation.feature_set_of(run, images, 0, mesh, size, state)
      statistics[run.network.metric] = frechet.Statistics(whole.mean, whole.cov)
  if not statistics:
    raise UserError(
      f"config.evaluate.features={config.evaluate.features!r}: must name a network with "
      "a Frechet distance"
    )
  path = os.path.join(workdir, "statistics.npz")
  if jax.process_index() == 0:
    reference_statistics.save(path, statistics)
  return f"{', '.join(statistics)} of {images.size} images: {path}"
