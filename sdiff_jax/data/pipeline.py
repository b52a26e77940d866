"""Sources of data, and batches of them: batch k is a function of (seed, k)."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.data.normalizer import Normalizer
from sdiff_jax.types import Array, UserError


class Dataset(NamedTuple):
  """A data set with random access.

  Attributes:
    take: indices int [n] -> images uint8 [n, H, W, C] and their conditions, which are
      {"label": int32 [n]}. Of latents, means and standard deviations, float32
      [n, H, W, 2C]. Of trajectories, normalised actions float32 [n, H, Da] and
      {"observation": float32 [n, Do]}.
    size: number of images.
    shape: (H, W, C), or (H, Da).
    classes: number of labels.
    mean: mean of the pixels in [-1, 1], or latents, one for all or one a channel.
    std: their standard deviation; the network sees (x - mean) sigma_d / std.
    latent: whether they are latents.
    low: of latents: the lowest pixel that their autoencoder knows; the highest is 1.
    observation: Do, numbers of an observation; 0 for none.
    normaliser: of trajectories, or None.
  """

  take: Callable[[np.ndarray], tuple[np.ndarray, dict[str, np.ndarray]]]
  size: int
  shape: tuple[int, ...]
  classes: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  latent: bool = False
  low: float = -1.0
  observation: int = 0
  normaliser: Normalizer | None = None


def conditions(source: Dataset, count: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes and types of the conditions of `count` samples."""
  if source.observation:
    shape = (count, source.observation)
    return {"observation": jax.ShapeDtypeStruct(shape, jnp.float32)}
  return {"label": jax.ShapeDtypeStruct((count,), jnp.int32)}


def check_pixels(source: Dataset) -> None:
  """Raises a UserError if a source has latents or trajectories."""
  if source.normaliser:
    raise UserError(
      "config.data are trajectories, not images: networks train on them, and are "
      "judged by --job=rollout"
    )
  if source.latent:
    raise UserError(
      "config.data are latents: this needs images; name a data set of images"
    )


def checked(source: Dataset) -> Dataset:
  """Returns a source whose `mean` and `std` fit its images.

  Raises:
    UserError: they do not.
  """
  channels = source.shape[-1]
  for name, values in (("mean", source.mean), ("std", source.std)):
    if len(values) not in (1, channels):
      raise UserError(
        f"config.data.{name}={values}: the images have {channels} channel(s); give one "
        "number for all, or one a channel"
      )
  if min(source.std) <= 0:
    raise UserError(f"config.data.std={source.std}: must be above 0")
  return source


def encode(source: Dataset, images: np.ndarray, sigma_d: float) -> np.ndarray:
  """Returns x0 = (x - mean) sigma_d / std, float32, of what `take` returned."""
  pixels = images.dtype == np.uint8
  values = images.astype(np.float32) / 127.5 - 1 if pixels else images
  mean, scale = _affine(source, sigma_d)
  return (values - mean) * scale


def decode(source: Dataset, x0: Array, sigma_d: float) -> Array:
  """Returns uint8 images of x0, the inverse of `encode`, clipped.

  Raises:
    UserError: x0 are latents.
  """
  check_pixels(source)
  return pixels(unscaled(source, x0, sigma_d))


def unscaled(source: Dataset, x0: Array, sigma_d: float) -> Array:
  """Returns the pixels in [-1, 1], or latents, of x0."""
  mean, scale = _affine(source, sigma_d)
  return x0 / scale + mean


def pixels(values: Array, low: float = -1.0) -> Array:
  """Returns uint8 images of values in [low, 1], clipped."""
  levels = (values - low) * (255 / (1 - low))
  return jnp.clip(jnp.round(levels), 0, 255).astype(jnp.uint8)


def _affine(source: Dataset, sigma_d: float) -> tuple[np.ndarray, np.ndarray]:
  ones = (1,) * len(source.shape)
  mean, std = (np.float32(a).reshape(*ones, -1) for a in (source.mean, source.std))
  return mean, np.float32(sigma_d) / std


def indices(size: int, seed: int, k: int, batch_size: int) -> np.ndarray:
  """Returns the indices of batch k: epochs of permutations, one after the other.

  Args:
    size: number of images.
    seed: of the permutations.
    k: number of the batch.
    batch_size: images a batch, over all processes.
  """
  position = k * batch_size + np.arange(batch_size)
  epoch, offset = np.divmod(position, size)
  out = np.empty(batch_size, np.int64)
  for e in np.unique(epoch):
    out[epoch == e] = _permutation(size, seed, int(e))[offset[epoch == e]]
  return out


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(size)


def flips(seed: int, k: int, batch_size: int) -> np.ndarray:
  """Returns which images of batch k are mirrored, bool [batch_size], each by a coin."""
  coins = np.random.default_rng((seed, k, 1))  # apart from the order
  return coins.random(batch_size) < 0.5


def sample_posterior(
  moments: np.ndarray, seed: int, k: int, rows: np.ndarray
) -> np.ndarray:
  """Returns latents mean + std eps, float32 [n, H, W, C], for the rows of batch k.

  Args:
    moments: means and standard deviations, float32 [n, H, W, 2C].
    seed: of eps, which depends on it, k and the row alone.
    k: number of the batch.
    rows: of the batch, int [n].
  """
  mean, std = np.split(moments, 2, axis=-1)
  eps = [
    np.random.default_rng((seed, k, 2, row)).standard_normal(mean.shape[1:], np.float32)
    for row in rows.tolist()
  ]
  return mean + std * np.stack(eps)


def batches(
  source: Dataset,
  *,
  seed: int,
  batch_size: int,
  sigma_d: float,
  start: int = 0,
  flip: bool = False,
  rows: np.ndarray | None = None,
) -> Iterator[dict]:
  """Yields batches start, start + 1, ..., or some rows of each, without end.

  Args:
    source: the images.
    seed: of the order, and of the flips.
    batch_size: images a batch, over all processes.
    sigma_d: standard deviation to scale to.
    start: number of the first batch.
    flip: whether to mirror each image, left to right, with probability 1/2.
    rows: which n of the batch_size rows to read, those of this process; None for all.

  Yields:
    {"x0": float32 [n, ...], "cond": the conditions of `take`}.
  """
  mine = np.arange(batch_size) if rows is None else rows

  def load(k: int) -> dict:
    chosen = indices(source.size, seed, start + k, batch_size)[mine]
    images, cond = source.take(chosen)
    if flip:
      mirrored = flips(seed, start + k, batch_size)[mine][:, None, None, None]
      images = np.where(mirrored, images[:, :, ::-1], images)
    if source.latent:
      images = sample_posterior(images, seed, start + k, mine)
    return {"x0": encode(source, images, sigma_d), "cond": cond}

  # An element is a whole batch, so threads work on batches and no state is needed.
  endless = grain.MapDataset.range(2**40).map(load)
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
  return iter(endless.to_iter_dataset(options))
