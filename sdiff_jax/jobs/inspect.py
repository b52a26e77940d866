"""Job `inspect`: shows a data set after preprocessing and measures its statistics."""

import os

import ml_collections
import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import Dataset
from sdiff_jax.experiment import build as experiments
from sdiff_jax.io import image_io
from sdiff_jax.io.progress import Progress

NUM_IMAGES = 100  # number of images in inspect.png
BATCH_SIZE = 256


@registry.register(
  "jobs", "inspect", configs_of=("train", "encode"), shares_workdir=True
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes inspect.png, prints statistics of the data set, and returns the last line.

  Every image is read once, so that damaged files are reported before training.

  Raises:
    UserError: a field is invalid, a file cannot be read, or the data are latents.
  """
  source = registry.build("data", config.data.to_dict(), "config.data")
  experiments.check_images(source)
  labels, counts = _walk(source)
  print("\n".join(_describe(source, config, labels, counts)))
  path = os.path.join(workdir, "inspect.png")
  indices, columns = _grid_indices(labels, source.num_classes)
  x0 = source.codec.encode(source[indices.clip(0)][0], config.sigma_d)
  images = np.array(source.codec.to_images(x0, config.sigma_d))
  images[indices < 0] = 0
  image_io.save_png(path, image_io.grid(images, columns))
  return f"inspected {source.size} images: {path}"


def _walk(source: Dataset) -> tuple[np.ndarray, np.ndarray]:
  """Returns all labels [N] and the histogram of the pixel values, int [256, C]."""
  labels, counts = [], np.zeros((256, source.shape[-1]), np.int64)
  starts = range(0, source.size, BATCH_SIZE)
  with Progress(source.size, label="inspect", unit="image") as progress:
    for start in starts:
      rows = np.arange(start, min(start + BATCH_SIZE, source.size))
      images, cond = source[rows]
      labels.append(source.class_of(cond, len(rows)))
      for channel in range(source.shape[-1]):
        levels = images[..., channel].ravel()
        counts[:, channel] += np.bincount(levels, minlength=256)
      progress.add(len(rows))
  return np.concatenate(labels), counts


def _describe(
  source: Dataset,
  config: ml_collections.ConfigDict,
  labels: np.ndarray,
  counts: np.ndarray,
) -> list[str]:
  """Returns lines about size, classes, mean and standard deviation of a data set."""
  lines = [f"{source.size} images of {' x '.join(map(str, source.shape))}"]
  if source.num_classes:
    each = np.bincount(labels[labels >= 0], minlength=source.num_classes)
    lines[0] += f", {source.num_classes} classes of {each.min()} to {each.max()} images"
  # Moments of the 256 encoded pixel values, weighted by their counts.
  levels = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
  levels = levels.repeat(counts.shape[1], axis=-1)
  seen = source.codec.encode(levels, config.sigma_d)[:, 0, 0].astype(np.float64)
  for channel, (mean, std) in enumerate(zip(*_moments(seen, counts), strict=True)):
    lines.append(
      f"x0, channel {channel}: mean {mean:.3f}, should be 0; "
      f"std {std:.3f}, should be sigma_d = {config.sigma_d}"
    )
  mean, std = _moments(levels[:, 0, 0] / 127.5 - 1, counts)
  lines.append(
    f"config.data:          mean={source.codec.mean}, std={source.codec.std}"
  )
  lines.append(f"better, as measured: mean={_text(mean)}, std={_text(std)}")
  return lines


def _moments(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean and standard deviation [C] of values [256, C] with their counts."""
  weight = counts / counts.sum(axis=0, keepdims=True)
  mean = (weight * values).sum(axis=0, keepdims=True)
  return mean[0], np.sqrt((weight * (values - mean) ** 2).sum(axis=0))


def _text(numbers: np.ndarray) -> tuple[float, ...]:
  return tuple(round(float(x), 3) for x in numbers)


def _grid_indices(labels: np.ndarray, classes: int) -> tuple[np.ndarray, int]:
  """Returns indices of the images in the grid, row by row, and its number of columns.

  An index of -1 is an empty cell. With 2 to 10 classes, each column shows one of them.
  """
  if not 2 <= classes <= 10:
    return _spread(np.arange(len(labels)), NUM_IMAGES), 10
  cells = np.full((NUM_IMAGES // classes, classes), -1)
  for label in range(classes):
    column = _spread(np.flatnonzero(labels == label), len(cells))
    cells[: len(column), label] = column
  return cells.ravel(), classes


def _spread(candidates: np.ndarray, count: int) -> np.ndarray:
  """Returns `count` evenly spaced candidates, or all if there are fewer."""
  count = min(count, len(candidates))
  return candidates[np.arange(count) * len(candidates) // max(count, 1)]
