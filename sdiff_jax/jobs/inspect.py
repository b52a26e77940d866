"""Job `inspect`: shows and measures a data set as the network sees it."""

import os

import ml_collections
import numpy as np
import tqdm

from sdiff_jax import registry
from sdiff_jax.data import Dataset
from sdiff_jax.experiment import build as experiments
from sdiff_jax.io import image_io

IMAGES = 100  # of the picture
BATCH = 256


@registry.register("jobs", "inspect", configs_of=("train", "encode"))
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes inspect.png, prints what is in the data set, and returns the last line.

  Every image is read once, so a file that cannot be read is found here.

  Raises:
    UserError: the data set refuses its fields or a file, or has latents.
  """
  source = registry.build("data", config.data.to_dict(), "config.data")
  experiments.check_images(source)
  labels, counts = _walk(source)
  print("\n".join(_describe(source, config, labels, counts)))
  path = os.path.join(workdir, "inspect.png")
  chosen, columns = _chosen(labels, source.num_classes)
  x0 = source.codec.encode(source[chosen.clip(0)][0], config.sigma_d)
  images = np.array(source.codec.to_images(x0, config.sigma_d))
  images[chosen < 0] = 0
  image_io.save_png(path, image_io.grid(images, columns))
  return f"inspected {source.size} images: {path}"


def _walk(source: Dataset) -> tuple[np.ndarray, np.ndarray]:
  """Returns all labels [N], and how often each level occurs, int [256, C]."""
  labels, counts = [], np.zeros((256, source.shape[-1]), np.int64)
  starts = range(0, source.size, BATCH)
  for start in tqdm.tqdm(starts, unit="batch", desc="inspect", disable=None):
    rows = np.arange(start, min(start + BATCH, source.size))
    images, cond = source[rows]
    labels.append(source.class_of(cond, len(rows)))
    for channel in range(source.shape[-1]):
      levels = images[..., channel].ravel()
      counts[:, channel] += np.bincount(levels, minlength=256)
  return np.concatenate(labels), counts


def _describe(
  source: Dataset,
  config: ml_collections.ConfigDict,
  labels: np.ndarray,
  counts: np.ndarray,
) -> list[str]:
  """Returns lines on size, classes and scale of a data set."""
  lines = [f"{source.size} images of {' x '.join(map(str, source.shape))}"]
  if source.num_classes:
    each = np.bincount(labels, minlength=source.num_classes)
    lines[0] += f", {source.num_classes} classes of {each.min()} to {each.max()} images"
  # The moments of the 256 levels as the network sees them, weighted by their counts.
  levels = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
  levels = levels.repeat(counts.shape[1], axis=-1)
  seen = source.codec.encode(levels, config.sigma_d)[:, 0, 0].astype(np.float64)
  for channel, (mean, std) in enumerate(zip(*_moments(seen, counts), strict=True)):
    lines.append(
      f"x0, channel {channel}: mean {mean:.3f}, to be 0; "
      f"std {std:.3f}, to be sigma_d = {config.sigma_d}"
    )
  mean, std = _moments(levels[:, 0, 0] / 127.5 - 1, counts)
  lines.append(
    f"config.data:          mean={source.codec.mean}, std={source.codec.std}"
  )
  lines.append(f"better, as measured: mean={_text(mean)}, std={_text(std)}")
  return lines


def _moments(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean and standard deviation [C] of values [256, C] with their counts."""
  share = counts / counts.sum(axis=0, keepdims=True)
  mean = (share * values).sum(axis=0, keepdims=True)
  return mean[0], np.sqrt((share * (values - mean) ** 2).sum(axis=0))


def _text(numbers: np.ndarray) -> tuple[float, ...]:
  return tuple(round(float(x), 3) for x in numbers)


def _chosen(labels: np.ndarray, classes: int) -> tuple[np.ndarray, int]:
  """Returns the indices of the picture, row by row, -1 for an empty cell; and columns.

  Columns are the classes where there are 2 to 10 of them.
  """
  if not 2 <= classes <= 10:
    return _spread(np.arange(len(labels)), IMAGES), 10
  cells = np.full((IMAGES // classes, classes), -1)
  for label in range(classes):
    column = _spread(np.flatnonzero(labels == label), len(cells))
    cells[: len(column), label] = column
  return cells.ravel(), classes


def _spread(candidates: np.ndarray, count: int) -> np.ndarray:
  """Returns `count` of the candidates, evenly spread, or all if they are fewer."""
  count = min(count, len(candidates))
  return candidates[np.arange(count) * len(candidates) // max(count, 1)]
