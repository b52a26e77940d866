"""Images with classes in tars of WebDataset, which are read where they lie.

Those of a bucket are copied to this machine first, once.
"""

import hashlib
import io
import os
import tarfile
from typing import Annotated, Literal, NamedTuple

import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import _image_files, folder
from sdiff_jax.data._codecs import PixelCodec
from sdiff_jax.data._dataset import Dataset, Samples, class_cond
from sdiff_jax.fields import Means, Path, Range, Scales
from sdiff_jax.io import bounded, downloads, image_io, storage
from sdiff_jax.types import UserError

MAX_LABEL = 18  # digits of a file .cls


class _Place(NamedTuple):
  """Where the bytes of an image are: a part of a tar."""

  path: str
  name: str
  start: int
  size: int
  label: int

  def read(self) -> bytes:
    with open(self.path, "rb") as file:
      file.seek(self.start)
      return file.read(self.size)


@registry.register("data", "shards")
def build(
  *,
  dir: Path = "",
  image_size: Annotated[int, Range(1, folder.MAX_SIDE)] = 64,
  channels: Literal[1, 3] = 3,
  mean: Means = (0.0,),
  std: Scales = (0.5,),
) -> Dataset:
  """Returns the images of all tars of a folder, with their classes.

  A tar holds "key.png" (or .jpg, .webp) and, if images have classes, "key.cls" with a
  number, one after the other, and is not compressed. Tars that captions belong to are
  read by the data set `captions`.

  Args:
    dir: folder of files *.tar, in the order of their names.
    image_size: side that images are resized and cropped to, pixels.
    channels: 3 for RGB, 1 for gray.
    mean: mean of the pixels in [-1, 1], one for all or one for each channel.
    std: standard deviation of the pixels in [-1, 1], likewise.

  Raises:
    ValueError: the folder is missing, or has no images.
    UserError: a tar is damaged, or some images alone have classes; or there is no space
      for the copies.
  """
  if not storage.isdir(dir):
    raise ValueError(f"dir={dir!r}: is not a folder; name one of files .tar")
  names = sorted(name for name in storage.listdir(dir) if name.endswith(".tar"))
  paths = [os.path.join(dir, name) for name in names]
  tars = [found for path in paths if (found := _images(downloads.local(path)))]
  if not tars:
    raise ValueError(
      f"dir={dir!r}: no .tar with {', '.join(_image_files.ENDINGS)} files; put them there"
    )
  places = [place for tar in tars for place in tar]
  labels = np.array([place.label for place in places], np.int64)
  num_classes = 0
  if labels.max() >= 0:
    num_classes = _image_files.check_num_classes(labels, dir)
  labels = labels.astype(np.int32)
  shape = (image_size, image_size, channels)

  def read(indices: np.ndarray) -> Samples:
    images = np.empty((len(indices), *shape), np.uint8)
    for image, k in zip(images, indices, strict=True):
      image[...] = _decode(places[k], image_size, channels)
    return images, {"label": labels[indices]} if num_classes else {}

  read(np.array([0, len(places) - 1]))

  def fingerprint() -> bytes:
    digest = hashlib.sha256(repr((shape, num_classes)).encode() + labels.tobytes())
    for path in paths:
      entry = (os.path.basename(path), *storage.version(path))
      digest.update(repr(entry).encode("utf-8", "surrogateescape"))
    return digest.digest()

  return Dataset(
    read,
    len(places),
    class_cond(num_classes),
    PixelCodec(shape, mean, std),
    fingerprint,
    shards=tuple(map(len, tars)),
  )


def _images(path: str) -> list[_Place]:
  """Returns the images of a tar, in their order; -1 is the label of one without."""
  images: dict[str, tuple[str, int, int]] = {}
  labels: dict[str, int] = {}
  try:
    with tarfile.open(path, "r:") as tar:
      for member in tar:
        folder_name, _, file_name = member.name.rpartition("/")
        key, _, ending = file_name.partition(".")
        key = f"{folder_name}/{key}"
        if not member.isfile() or not member.size:
          continue
        if f".{ending.lower()}" in _image_files.ENDINGS:
          if member.size > image_io.MAX_FILE:
            raise ValueError(f"{member.name[:60]} has {member.size} bytes")
          images[key] = member.name, member.offset_data, member.size
        elif ending == "cls":
          place = _Place(path, member.name, member.offset_data, member.size, -1)
          labels[key] = int(place.read()[:MAX_LABEL])
          if labels[key] < 0:
            raise ValueError(f"{member.name[:60]} is {labels[key]}; number from 0")
  except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} is damaged ({bounded.short(error)})") from error
  without = [key for key in images if key not in labels] if labels else []
  if without:
    raise UserError(
      f"{path}: no class of {bounded.short(images[without[0]][0], 60)} and of "
      f"{len(without) - 1} more; add their .cls, or remove all"
    )
  return [_Place(path, *at, labels.get(key, -1)) for key, at in images.items()]


def _decode(place: _Place, side: int, channels: int) -> np.ndarray:
  """Returns an image uint8 [side, side, C].

  Raises:
    UserError: it cannot be read.
  """
  try:
    return folder.decode(io.BytesIO(place.read()), side, channels)
  except image_io.UNREADABLE as error:
    reason = bounded.short(error) or type(error).__name__
    raise UserError(
      f"{place.path}: {bounded.short(place.name, 60)} cannot be read ({reason}); replace "
      "or remove it"
    ) from error
