"""A data set with a condition of its own: the position of a blob in the image."""

import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import Dataset, PixelCodec
from sdiff_jax.types import CondSpec


@registry.register("data", "blobs")
def build(*, size=8, count=1024, seed=0):
  """Returns images uint8 [size, size, 1] of a blob, conditioned on where it is.

  Args:
    size: pixels of an edge; all arguments are the config's fields.
    count: number of images.
    seed: of the positions.
  """
  positions = np.random.default_rng(seed).uniform(-1, 1, (count, 2)).astype(np.float32)
  grid = np.linspace(-1, 1, size)

  def read(indices):
    y, x = positions[indices].T[:, :, None]
    squares = (grid - y)[:, :, None] ** 2 + (grid - x)[:, None, :] ** 2
    images = np.round(255 * np.exp(-8 * squares)).astype(np.uint8)
    return images[..., None], {"position": positions[indices]}

  # Networks, samplers and jobs read this: a vector of two numbers for each sample.
  cond = {"position": CondSpec((2,), np.float32)}
  return Dataset(read, count, cond, PixelCodec((size, size, 1), (-0.6,), (0.5,)))
