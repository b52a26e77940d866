"""Job `statistics`: mean and covariance of features, for evaluate.reference."""

import os

import jax
import ml_collections

from sdiff_jax import registry
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import evaluation
from sdiff_jax.metrics import frechet, reference_statistics
from sdiff_jax.types import UserError


@registry.register("jobs", "statistics")
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes statistics.npz of config.reference, or else of config.data.

  Raises:
    UserError: the data are latents, or the network of evaluate.features does not fit.
  """
  if config.evaluate.reference:
    raise UserError("config.evaluate.reference: empty it; it is what this job makes")
  source = evaluation.real(config)
  found = evaluation.networks(config, experiments.mesh(config), source.shape)
  made = {
    one[0].metric: frechet.estimated(evaluation.summary_of(one, source, 0).moments)
    for one in found
  }
  path = os.path.join(workdir, "statistics.npz")
  if jax.process_index() == 0:
    os.makedirs(workdir, exist_ok=True)
    reference_statistics.save(path, made)
  return f"{', '.join(made)} of {source.size} images: {path}"
