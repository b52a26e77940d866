"""Batches of a data set: batch k is a function of (seed, k) alone."""

import functools
import os
from collections.abc import Iterator

import numpy as np

from sdiff_jax.data._dataset import Dataset

# Streams of random numbers of a batch, besides the order of the samples.
FLIPS, NOISE = 1, 2
MAX_THREADS = 16  # unless more are asked for
PREFETCHED = 8  # batches, or one for each thread if these are more


def indices(
  size: int,
  seed: int,
  k: int,
  batch_size: int,
  shards: tuple[int, ...] = (),
  shuffle_buffer: int = 0,
) -> np.ndarray:
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
    shards: numbers of samples of the files, see `Dataset`.
    shuffle_buffer: see `order`.
  """
  position = k * batch_size + np.arange(batch_size)
  epoch, offset = np.divmod(position, size)
  out = np.empty(batch_size, np.int64)
  for e in np.unique(epoch):
    order_of_epoch = order(size, seed, int(e), shards, shuffle_buffer)
    out[epoch == e] = order_of_epoch[offset[epoch == e]]
  return out


@functools.lru_cache(maxsize=2)
def order(
  size: int,
  seed: int,
  epoch: int,
  shards: tuple[int, ...] = (),
  shuffle_buffer: int = 0,
) -> np.ndarray:
  """Returns the order of the samples in an epoch, a permutation int [size].

  With a buffer, files are read one after the other, in a random order, and of each
  `shuffle_buffer` samples in a row the order is random. It is a function of its
  arguments, as that of whole permutations is, so training resumes at any batch.

  Example:
    >>> order(6, seed=0, epoch=0, shards=(3, 3), shuffle_buffer=3).reshape(2, 3) // 3
    array([[0, 0, 0],
           [1, 1, 1]])

  Args:
    size: number of samples.
    seed: of the order.
    epoch: number of the epoch.
    shards: numbers of samples of the files, with sum `size`; () for one file.
    shuffle_buffer: number of samples, or 0 to permute all of them.
  """
  random = np.random.default_rng((seed, epoch))
  if not shuffle_buffer:
    return random.permutation(size)
  ends = np.cumsum(shards or (size,))
  starts = ends - np.array(shards or (size,))
  files = random.permutation(len(ends))
  out = np.concatenate([np.arange(starts[f], ends[f]) for f in files])
  for first in range(0, size, shuffle_buffer):
    random.shuffle(out[first : first + shuffle_buffer])
  return out


def default_threads() -> int:
  """Returns how many threads read and decode: one a core of this process, 2 to 16."""
  known = hasattr(os, "sched_getaffinity")  # not on macOS
  cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
  return max(2, min(MAX_THREADS, cores))


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
  shuffle_buffer: int = 0,
  num_threads: int = 0,
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
    shuffle_buffer: see `order`.
    num_threads: that read and decode batches; 0 for `default_threads`. They do not change
      the batches.

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
    numbers = indices(
      dataset.size, seed, start + k, batch_size, dataset.shards, shuffle_buffer
    )
    raw, cond = dataset[numbers[mine]]
    if flip:
      raw = codec.mirror(raw, flips(seed, start + k, batch_size)[mine])
    noise_seeds = [(seed, start + k, NOISE, row) for row in mine.tolist()]
    return {"x0": codec.encode(raw, sigma_d, noise_seeds), "cond": cond}

  # An element is a whole batch, a function of its number, so Grain's threads work on
  # batches and training resumes at any of them without a state of the iterator. Grain's
  # `batch` would decode one sample at a time, where data sets read a batch at once.
  endless = grain.MapDataset.range(2**40).map(load)
  threads = num_threads or default_threads()
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=max(PREFETCHED, threads)
  )
  return iter(endless.to_iter_dataset(options))
