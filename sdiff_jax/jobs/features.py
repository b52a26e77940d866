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
    UserError: the data have fewer than two classes, images without a class, or are
      latents; or config.reference has images of another shape.
  """
  dataset = registry.build("data", config.data.to_dict(), "config.data")
  if dataset.num_classes < 2:
    raise UserError(
      f"config.data.name={config.data.name!r}: must be a labeled data set, this one has "
      f"{dataset.num_classes} classes"
    )
  reference = None
  if config.reference.name:
    section = config.reference.to_dict()
    reference = registry.build("data", section, "config.reference")
    if reference.shape != dataset.shape or not reference.num_classes:
      raise UserError(
        f"config.reference: images {reference.shape} of {reference.num_classes} classes; "
        f"they must be {dataset.shape} with labels, as those of config.data"
      )
  path = os.path.join(workdir, "features.npz")
  if jax.process_index():
    return path
  images, labels = _read_all(dataset)
  settings = {"data": config.data.to_dict(), "digest": dataset.digest().hex()}
  snapshot = Snapshot(os.path.join(workdir, "features.partial.npz"), settings)
  weights = classifier.fit(images, labels, dataset.num_classes, snapshot=snapshot)
  classifier.save(path, weights)
  snapshot.remove()
  test = "training"
  if reference is not None:
    test = "reference"
    images, labels = _read_all(reference)
  _, logits = classifier.predict(weights, images)
  accuracy = np.mean(logits.argmax(axis=1) == labels)
  return f"accuracy on {len(labels)} {test} images {accuracy:.4f}: {path}"


def _read_all(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
  """Returns all images, uint8 [N, H, W, C], and labels, int [N]."""
  experiments.check_images(dataset)
  images, cond = dataset[np.arange(dataset.size)]
  labels = dataset.class_of(cond, dataset.size)
  if labels.min() < 0:
    raise UserError("config.data: some images have no class; the classifier needs all")
  return images, labels
