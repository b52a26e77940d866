"""Images with classes or captions in Parquet files, as the Hugging Face Hub stores them."""

import hashlib
import io
import os
from typing import Annotated, Literal

import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import _image_files, _parquet_files, folder
from sdiff_jax.data._codecs import PixelCodec
from sdiff_jax.data._dataset import Dataset, Samples, class_cond
from sdiff_jax.data._parquet_files import Table
from sdiff_jax.fields import Means, Path, Range, Scales
from sdiff_jax.io import bounded, image_io, storage
from sdiff_jax.types import UserError

LABEL = "label"
CAPTIONS = ("text", "caption", "prompt")  # columns of captions, the first that is there
MAX_LABEL = 2**62  # larger numbers are read as this one, which is refused


@registry.register("data", "parquet")
def build(
  *,
  dir: Path = "",
  split: str = "train",
  image_column: str = "",
  label_column: str = "",
  caption_column: str = "",
  image_size: Annotated[int, Range(1, folder.MAX_SIDE)] = 64,
  channels: Literal[1, 3] = 3,
  mean: Means = (0.0,),
  std: Scales = (0.5,),
) -> Dataset:
  """Returns the images of Parquet files, with their classes or their captions.

  A column holds the images, as bytes or as a struct with `bytes`, the files of PNG, JPEG
  or WebP. A group of rows is read at once, and 1 GiB of them is kept, so that larger data
  need a shuffle buffer. In a bucket the groups that are needed are read where they lie.

  Args:
    dir: folder of files *.parquet, in the order of their names.
    split: beginning of the names of the files that are read, before "-" or the ending;
      "" for all.
    image_column: name of the column of images; "" for the only one.
    label_column: name of the column of classes; "" for `label`, if it is there.
    caption_column: name of the column of captions, which --job=encode encodes; "" for
      `text`, `caption` or `prompt`, if it is there and classes are not.
    image_size: side that images are resized and cropped to, pixels.
    channels: 3 for RGB, 1 for gray.
    mean: mean of the pixels in [-1, 1], one for all or one for each channel.
    std: standard deviation of the pixels in [-1, 1], likewise.

  Raises:
    ValueError: the folder is missing, or has no such files or columns.
    UserError: a file is damaged; an image, a class or a caption only when it is read.
  """
  table = Table(_parquet_files.paths(dir, split))
  if not table.size:
    raise ValueError(f"dir={dir!r}: its files have no rows")
  shape = (image_size, image_size, channels)
  codec = PixelCodec(shape, mean, std)
  image = _column(table, "image_column", image_column, "image")
  label = _optional(table, "label_column", label_column, (LABEL,), "integer")
  texts = () if label else CAPTIONS
  caption = _optional(table, "caption_column", caption_column, texts, "text")
  num_classes = table.classes.get(label, 0)
  if label and not num_classes:  # the files do not name their classes
    labels = _labels(table, label, np.arange(table.size))
    num_classes = _image_files.check_num_classes(labels, dir)

  def read(indices: np.ndarray) -> Samples:
    images = np.empty((len(indices), *shape), np.uint8)
    for k, data in enumerate(table.values(image, indices)):
      images[k] = _decode(data, image_size, channels, table, int(indices[k]))
    if not label:
      return images, {}
    labels = _labels(table, label, indices)
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
      raise UserError(
        f"{table.where(int(indices[outside][0]))}: the label is {labels[outside][0]} of "
        f"{num_classes} classes; number them from 0"
      )
    return images, {"label": labels.astype(np.int32)}

  def captions(indices: np.ndarray) -> list[str]:
    found = table.values(caption, indices)
    if None in found:
      k = int(indices[found.index(None)])
      raise UserError(f"{table.where(k)}: has no {caption}; leave such rows out")
    return [" ".join(text.split()) for text in found]

  def fingerprint() -> bytes:
    digest = hashlib.sha256(repr((shape, num_classes, image, label, caption)).encode())
    for path in table.paths:
      digest.update(repr((os.path.basename(path), *storage.version(path))).encode())
    return digest.digest()

  read(np.array([0, table.size - 1]))
  return Dataset(
    read,
    table.size,
    class_cond(num_classes),
    codec,
    fingerprint,
    captions if caption else None,
    table.rows,
  )


def _column(table: Table, argument: str, name: str, kind: str) -> str:
  """Returns the name of the column of a kind, which may be given.

  Raises:
    ValueError: there is none, or several; the message starts with the argument.
  """
  found = [column for column, its_kind in table.kinds.items() if its_kind == kind]
  if name in found:
    return name
  if not name and len(found) == 1:
    return found[0]
  columns = ", ".join(f"{column} ({k})" for column, k in table.kinds.items())
  article = "an" if kind[0] in "aeiou" else "a"
  raise ValueError(
    f"{argument}={name!r}: must be {article} {kind} column; there is "
    f"{bounded.short(columns)}"
  )


def _optional(
  table: Table, argument: str, name: str, names: tuple[str, ...], kind: str
) -> str:
  """Returns the name that is given, or the first of `names` of a kind, or ""."""
  if name:
    return _column(table, argument, name, kind)
  return next((n for n in names if table.kinds.get(n) == kind), "")


def _labels(table: Table, column: str, indices: np.ndarray) -> np.ndarray:
  """Returns the classes of rows, int64 [n]; -1 for rows without."""
  found = table.values(column, indices)
  return np.array([-1 if k is None else min(k, MAX_LABEL) for k in found], np.int64)


def _decode(
  data: bytes | None, side: int, channels: int, table: Table, index: int
) -> np.ndarray:
  """Returns an image uint8 [side, side, C].

  Raises:
    UserError: it cannot be read.
  """
  reason = "it has no bytes; store the images themselves, not their paths"
  if data is not None:
    try:
      if len(data) > image_io.MAX_FILE:
        raise ValueError(f"it has {len(data)} bytes")
      return folder.decode(io.BytesIO(data), side, channels)
    except image_io.UNREADABLE as error:
      reason = bounded.short(error) or type(error).__name__
  raise UserError(
    f"{table.where(index)}: the image cannot be read ({reason}); replace or remove it"
  )
