"""Job `features`: trains the small classifier whose features `evaluate` measures in."""

import os

import jax
import ml_collections
import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import pipeline
from sdiff_jax.metrics.features import classifier
from sdiff_jax.types import UserError


@registry.register("jobs", "features")
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes features.npz for --config.evaluate.features, from the labels of the data.

  Raises:
    UserError: the data have fewer than two classes, or are latents.
  """
  source = registry.build("data", config.data.to_dict())
  if source.classes < 2:
    raise UserError(
      f"config.data: {source.classes} classes; features come from telling classes apart"
    )
  path = os.path.join(workdir, "features.npz")
  if jax.process_index():
    return path
  images, labels = _all(source)
  weights = classifier.fit(images, labels, source.classes)
  os.makedirs(workdir, exist_ok=True)
  classifier.save(path, weights)
  if config.reference.name:
    images, labels = _all(registry.build("data", config.reference.to_dict()))
  accuracy = np.mean(classifier.predict(weights, images)[1].argmax(axis=1) == labels)
  of = "reference" if config.reference.name else "training"
  return f"accuracy on {len(labels)} {of} images {accuracy:.4f}: {path}"


def _all(source: pipeline.Dataset) -> tuple[np.ndarray, np.ndarray]:
  pipeline.check_pixels(source)
  images, cond = source.take(np.arange(source.size))
  return images, cond["label"]
