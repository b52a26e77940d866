"""Earlier names of the loader and the codecs, until their callers use the new ones."""

from typing import Any

import jax
import numpy as np

from sdiff_jax.data._codecs import sample_posterior as _sample_posterior
from sdiff_jax.data._codecs import to_uint8 as pixels
from sdiff_jax.data._dataset import Dataset
from sdiff_jax.data._loading import batches, flips, indices
from sdiff_jax.types import Array, UserError

__all__ = ["Dataset", "batches", "flips", "indices", "pixels"]


def conditions(dataset: Dataset, count: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes and dtypes of the conditions of `count` samples."""
  return {name: spec.batch(count) for name, spec in dataset.cond.items()}


def check_pixels(dataset: Dataset) -> None:
  """Raises a UserError if a data set has latents or trajectories."""
  try:
    dataset.codec.check_images()
  except ValueError as error:
    raise UserError(f"config.{error}") from error


def encode(dataset: Dataset, raw: np.ndarray, sigma_d: float) -> np.ndarray:
  """Returns x0 of raw samples."""
  return dataset.codec.encode(raw, sigma_d)


def decode(dataset: Dataset, x0: Array, sigma_d: float) -> Array:
  """Returns images of x0."""
  check_pixels(dataset)
  return dataset.codec.to_images(x0, sigma_d)


def unscaled(dataset: Dataset, x0: Array, sigma_d: float) -> Array:
  """Returns latents of x0."""
  return dataset.codec.decode(x0, sigma_d)


def sample_posterior(moments: np.ndarray, seed: int, k: int, rows: Any) -> np.ndarray:
  """Returns latents of the rows of batch k."""
  return _sample_posterior(moments, [(seed, k, 2, int(row)) for row in rows])
