"""Data sets, one a file, and the loader of batches.

A data set is a `Dataset`: random access to raw samples and their conditions, and a codec
that maps raw samples to x0 and back. Batches of it are a function of a seed and a number:

  >>> from sdiff_jax.data import batches, digits
  >>> batch = next(batches(digits.build(), seed=0, batch_size=4, sigma_d=0.5))
  >>> batch["x0"].shape, sorted(batch["cond"])
  ((4, 8, 8, 1), ['label'])
"""

from sdiff_jax.data._codecs import ActionCodec, Codec, LatentCodec, PixelCodec, to_uint8
from sdiff_jax.data._dataset import Dataset, class_cond
from sdiff_jax.data._loading import batches

__all__ = [
  "ActionCodec",
  "Codec",
  "Dataset",
  "LatentCodec",
  "PixelCodec",
  "batches",
  "class_cond",
  "to_uint8",
]
