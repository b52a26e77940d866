"""Batches of a data set: batch k is a function of (seed, k) alone."""

import functools
from collections.abc import Iterator

import numpy as np

from sdiff_jax.data._dataset import Dataset

# Streams of random numbers of a batch, besides the order of the samples.
FLIPS, NOISE = 1, 2


def indices(size: int, seed: int, k: int, batch_size: int) -> np.ndarray:
  """Returns the indices of batch k: epochs of permutations in sequence.

  Grain's own `shuffle` permutes with another generator, which would change every batch
  of existing runs.

  Example:
    >>> np.sort(indices(size=4, seed=0, k=0, batch_size=4)).tolist()
    [0, 1, 2, 3]

  Args:
    size: number of samples of the data set.
    seed: seed of the permutations.
    k: number of the batch.
    batch_size: samples in a batch, over all processes.
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
  """Returns which samples of batch k are mirrored, bool [batch_size], each by a coin.

  Example:
    >>> flips(seed=0, k=0, batch_size=3).shape
    (3,)
  """
  coins = np.random.default_rng((seed, k, FLIPS))
  return coins.random(batch_size) < 0.5


def batches(
  dataset: Dataset,
  *,
  seed: int,
  batch_size: int,
  sigma_d: float,
  start: int = 0,
  flip: bool = False,
  rows: np.ndarray | None = None,
) -> Iterator[dict]:
  """Yields batches start, start + 1, ..., or some samples of each, without end.

  Example:
    >>> from sdiff_jax.data import digits
    >>> next(batches(digits.build(), seed=0, batch_size=2, sigma_d=0.5))["x0"].shape
    (2, 8, 8, 1)

  Args:
    dataset: the data set.
    seed: seed of the order, of the flips and of the noise of a random encoding.
    batch_size: samples in a batch, over all processes.
    sigma_d: standard deviation of x0.
    start: number of the first batch.
    flip: whether to mirror each sample, left to right, with probability 1/2.
    rows: which n of the batch_size samples to read, those of this process; None for
      all.

  Yields:
    {"x0": float32 [n, ...], "cond": conditions, each [n, ...]}.

  Raises:
    ValueError: the samples cannot be mirrored.
    UserError: a file cannot be read.
  """
  import grain.python as grain  # slow to import

  mine = np.arange(batch_size) if rows is None else rows
  codec = dataset.codec

  def load(k: int) -> dict:
    raw, cond = dataset[indices(dataset.size, seed, start + k, batch_size)[mine]]
    if flip:
      raw = codec.mirror(raw, flips(seed, start + k, batch_size)[mine])
    noise_seeds = [(seed, start + k, NOISE, row) for row in mine.tolist()]
    return {"x0": codec.encode(raw, sigma_d, noise_seeds), "cond": cond}

  # An element is a whole batch, a function of its number, so Grain's threads work on
  # batches and training resumes at any of them without a state of the iterator. Grain's
  # `batch` would decode one sample at a time, where data sets read a batch at once.
  endless = grain.MapDataset.range(2**40).map(load)
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
  return iter(endless.to_iter_dataset(options))
