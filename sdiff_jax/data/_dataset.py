"""The type of every data set."""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

from sdiff_jax.data._codecs import ActionCodec, Codec
from sdiff_jax.data.episodes.normalizer import Normalizer
from sdiff_jax.types import CondSpec, CondSpecs

HASHED_BATCH = 256  # samples that are read at once for a fingerprint
# Raw samples [n, ...] and their conditions, each [n, ...].
Samples = tuple[np.ndarray, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set with random access.

  Example:
    >>> from sdiff_jax.data import PixelCodec
    >>> numbers = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    >>> dataset = Dataset(lambda i: (numbers[i], {}), 6, {}, PixelCodec((1, 1, 1)))
    >>> dataset[np.array([4, 1])][0].ravel().tolist()
    [4, 1]

  Attributes:
    read: indices int [n] -> raw samples [n, ...] and their conditions.
    size: number of samples; 0 for a data set that is known by its shapes alone.
    cond: what a sample is conditioned on: name -> shape, dtype and number of classes.
    codec: the map from raw samples to x0.
    fingerprint: () -> a digest of all that `read` returns, or of the files behind it
      (names, sizes and times of modification); None to compute it from all samples.
    captions: indices int [n] -> texts of samples; None for a data set without.
    shards: numbers of samples of the files, in the order of the samples; () if there is
      no order in which reading is faster.
  """

  read: Callable[[np.ndarray], Samples]
  size: int
  cond: CondSpecs
  codec: Codec
  fingerprint: Callable[[], bytes] | None = None
  captions: Callable[[np.ndarray], list[str]] | None = None
  shards: tuple[int, ...] = ()

  def __getitem__(self, indices: np.ndarray) -> Samples:
    """Returns raw samples [n, ...] and their conditions.

    Args:
      indices: int [n].

    Raises:
      UserError: a file cannot be read.
    """
    return self.read(indices)

  def __len__(self) -> int:
    """Returns the number of samples."""
    return self.size

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of x0 of one sample."""
    return self.codec.shape

  @property
  def num_classes(self) -> int:
    """Number of classes of the first categorical condition; 0 if there is none."""
    return next((c.num_classes for c in self.cond.values() if c.num_classes), 0)

  @property
  def normalizer(self) -> Normalizer | None:
    """The normalizer of trajectories, None for other data."""
    return self.codec.normalizer if isinstance(self.codec, ActionCodec) else None

  def subset(self, indices: np.ndarray) -> "Dataset":
    """Returns some samples of the data set as a data set.

    Args:
      indices: of the samples, int [n].

    Example:
      >>> from sdiff_jax.data import digits
      >>> len(digits.build().subset(np.arange(5)))
      5
    """
    whole = self

    def fingerprint() -> bytes:
      return hashlib.sha256(whole.digest() + indices.tobytes()).digest()

    captions = self.captions
    return dataclasses.replace(
      self,
      read=lambda k: whole[indices[k]],
      size=len(indices),
      fingerprint=fingerprint,
      shards=(),
      captions=None if captions is None else lambda k: captions(indices[k]),
    )

  def digest(self) -> bytes:
    """Returns a digest that changes with the samples or the files that hold them."""
    if self.fingerprint is not None:
      return self.fingerprint()
    digest = hashlib.sha256(repr((self.size, self.shape)).encode())
    for first in range(0, self.size, HASHED_BATCH):
      raw, cond = self[np.arange(first, min(first + HASHED_BATCH, self.size))]
      for name, x in {"": raw, **cond}.items():
        digest.update(repr((name, x.shape, x.dtype.str)).encode())
        digest.update(np.ascontiguousarray(x).data)
    return digest.digest()

  def class_of(self, cond: dict[str, np.ndarray], count: int) -> np.ndarray:
    """Returns the class of each sample, int32 [count]; -1 if there are none.

    Args:
      cond: conditions of the samples.
      count: number of samples.
    """
    for name, spec in self.cond.items():
      if spec.num_classes:
        return cond[name]
    return np.full(count, -1, np.int32)

  def conditions(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Returns conditions to generate samples under.

    Sample k gets class k modulo the number of classes, and of every other condition
    the value of sample k modulo `size` of the data set.

    Args:
      numbers: numbers k of the samples, int [n].

    Raises:
      ValueError: a condition is not categorical, and the data are not here.
    """
    out = {}
    other = [name for name, spec in self.cond.items() if not spec.num_classes]
    if other and not self.size:
      raise ValueError(
        f"cond: values of {', '.join(other)} come from the data set, which is not here"
      )
    stored = self[numbers % self.size][1] if other else {}
    for name, spec in self.cond.items():
      if spec.num_classes:
        classes = numbers.astype(spec.dtype) % spec.num_classes
        shape = (-1,) + (1,) * len(spec.shape)
        out[name] = np.broadcast_to(classes.reshape(shape), (len(numbers), *spec.shape))
      else:
        out[name] = np.asarray(stored[name], spec.dtype)
    return out


def class_cond(num_classes: int) -> dict[str, CondSpec]:
  """Returns the conditions of images that have classes: {"label": ...}, {} for none.

  Args:
    num_classes: number of classes; 0 for none.

  Example:
    >>> class_cond(10)["label"].num_classes
    10
  """
  return {"label": CondSpec((), np.int32, num_classes)} if num_classes else {}
