"""Job `features`: trains a small classifier, whose features `evaluate` can use."""

import os

import jax
import ml_collections
import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import Dataset
from sdiff_jax.experiment import build as experiments
from sdiff_jax.io.snapshot import Snapshot
from sdiff_jax.metrics.features import classifier
from sdiff_jax.types import UserError


@registry.register("jobs", "features")
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Trains the classifier on config.data and writes features.npz.

  Its path is a value of --config.evaluate.features. The accuracy is that on
  config.reference, or else on the training images.

  Raises:
    UserError: the data have fewer than two classes, or are latents.
  """
  dataset = registry.build("data", config.data.to_dict(), "config.data")
  if dataset.num_classes < 2:
    raise UserError(
      f"config.data.name={config.data.name!r}: must be a labeled data set, this one has "
      f"{dataset.num_classes} classes"
    )
  path = os.path.join(workdir, "features.npz")
  if jax.process_index():
    return path
  images, labels = _read_all(dataset)
  settings = {"data": config.data.to_dict(), "size": len(images)}
  snapshot = Snapshot(os.path.join(workdir, "features.partial.npz"), settings)
  weights = classifier.fit(images, labels, dataset.num_classes, snapshot=snapshot)
  classifier.save(path, weights)
  snapshot.remove()
  test = "training"
  if config.reference.name:
    test = "reference"
    section = config.reference.to_dict()
    images, labels = _read_all(registry.build("data", section, "config.reference"))
  _, logits = classifier.predict(weights, images)
  accuracy = np.mean(logits.argmax(axis=1) == labels)
  return f"accuracy on {len(labels)} {test} images {accuracy:.4f}: {path}"


def _read_all(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
  """Returns all images, uint8 [N, H, W, C], and labels, int [N]."""
  experiments.check_images(dataset)
  images, cond = dataset[np.arange(dataset.size)]
  return images, dataset.class_of(cond, dataset.size)
