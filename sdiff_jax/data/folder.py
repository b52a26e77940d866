"""Images in a folder, decoded when they are asked for."""

import hashlib
import os
import time
from typing import Annotated, BinaryIO, Literal

import numpy as np
from PIL import Image

from sdiff_jax import registry
from sdiff_jax.data import _image_files
from sdiff_jax.data._codecs import PixelCodec
from sdiff_jax.data._dataset import Dataset, Samples, class_cond
from sdiff_jax.fields import Means, Path, Range, Scales
from sdiff_jax.io import bounded, image_io, storage
from sdiff_jax.types import UserError

UNREADABLE = image_io.UNREADABLE
MAX_SIDE = 2**13  # pixels
PACK = (  # why a folder in a bucket is not read, and what is
  "in a bucket each image would be a request; pack the images by --job=encode from a folder "
  "of this machine (its scale `pixels` keeps them as they are), or in an .npz file"
)
HELD_OUT = 10  # one image of so many is held out
NUM_CHECKED = 64  # images that are decoded before any work starts,
CHECK_SECONDS = 1.0  # unless that takes longer than this


@registry.register("data", "folder")
def build(
  *,
  dir: Path = "",
  image_size: Annotated[int, Range(1, MAX_SIDE)] = 64,
  channels: Literal[1, 3] = 3,
  mean: Means = (0.0,),
  std: Scales = (0.5,),
  split: Literal["all", "train", "test"] = "all",
) -> Dataset:
  """Returns the images below a folder with their classes.

  The classes are those of dataset.json, in the format of EDM, EDM2 and StyleGAN, if the
  folder has this file; otherwise its sub-folders, sorted. Images are turned as their
  EXIF orientation says, and transparent ones are composited over white.

  Args:
    dir: folder of PNG, JPEG or WebP files: with dataset.json; or with a sub-folder for
      each class, at any depth; without sub-folders, the files in it are one class. Hidden
      files and files with other suffixes are not read, which is reported on stderr.
    image_size: side that images are resized and cropped to, pixels.
    channels: 3 for RGB, 1 for gray.
    mean: mean of the pixels in [-1, 1], one for all or one for each channel.
    std: standard deviation of the pixels in [-1, 1], likewise.
    split: "test" for every tenth image, which "train" leaves out, or "all".

  Raises:
    ValueError: the folder is missing, has no images, or has chunks without dataset.json.
    UserError: dataset.json or an image is damaged; of many images only some are checked
      here, and a damaged one is reported when it is read.
  """
  if storage.remote(dir):
    raise ValueError(f"dir={dir!r}: {PACK}")
  shape = (image_size, image_size, channels)
  codec = PixelCodec(shape, mean, std)
  paths, labels, num_classes, unread = _image_files.find(dir)
  _image_files.report_unread(dir, unread)
  if split != "all":
    held_out = np.arange(len(paths)) % HELD_OUT == HELD_OUT - 1
    chosen = np.flatnonzero(held_out == (split == "test"))
    if not chosen.size:
      raise ValueError(
        f"split={split!r}: needs {HELD_OUT} images; {dir} has {len(paths)}"
      )
    paths, labels = [paths[k] for k in chosen], labels[chosen]

  def read(indices: np.ndarray) -> Samples:
    images = np.empty((len(indices), *shape), np.uint8)
    for image, k in zip(images, indices, strict=True):
      image[...] = _decode(paths[k], image_size, channels)
    return images, {"label": labels[indices]}

  end = time.monotonic() + CHECK_SECONDS
  for k in np.unique(np.linspace(0, len(paths) - 1, NUM_CHECKED).astype(int)):
    _decode(paths[k], image_size, channels)
    if time.monotonic() > end:
      break

  def fingerprint() -> bytes:
    digest = hashlib.sha256(repr((shape, num_classes)).encode())
    digest.update(labels.tobytes())
    for path in paths:
      status = os.stat(path)
      entry = (os.path.relpath(path, dir), status.st_size, status.st_mtime_ns)
      digest.update(repr(entry).encode("utf-8", "surrogateescape"))
    return digest.digest()

  return Dataset(read, len(paths), class_cond(num_classes), codec, fingerprint)


def files(dir: str) -> list[str]:
  """Returns the paths of the images below a folder, in the order of `build`.

  Raises:
    ValueError, UserError: see `build`.
  """
  return _image_files.find(dir).paths


def side(folder: str) -> int:
  """Returns the smaller side of the first image of a folder, pixels.

  Raises:
    ValueError, UserError: there is none, or it cannot be read.
  """
  return min(_decode(files(folder)[0], 0, 3).shape[:2])


def crop(image: Image.Image, height: int, width: int) -> Image.Image:
  """Returns the central part of an image of a height and a width, as ADM makes squares.

  The image is halved by averages while it is at least twice as large, resized (bicubic)
  to the smallest size that covers the part, and cropped.
  Source: `center_crop_arr` of guided-diffusion (Dhariwal & Nichol, arXiv:2105.05233).
  """
  while image.width >= 2 * width and image.height >= 2 * height:
    half = (image.width // 2, image.height // 2)
    image = image.resize(half, Image.Resampling.BOX)
  scale = max(width / image.width, height / image.height)
  size = (round(image.width * scale), round(image.height * scale))
  image_io.check_size(*size)  # of an image that is much longer than wide
  image = image.resize(size, Image.Resampling.BICUBIC)
  left, top = (image.width - width) // 2, (image.height - height) // 2
  return image.crop((left, top, left + width, top + height))


def decode(
  file: str | os.PathLike | BinaryIO, side: int = 0, channels: int = 3
) -> np.ndarray:
  """Returns an image file as uint8 [H, W, C]: RGB, or gray for one channel.

  See `image_io.to_color` for orientation, transparency and 16 bits in a pixel.

  Args:
    file: a path or an open file.
    side: of the central square to return, pixels; 0 for the whole image.
    channels: C, 1 or 3.

  Raises:
    OSError: the file cannot be read, or another of Pillow's errors (see UNREADABLE).
  """
  with image_io.open_image(file) as opened:
    image = image_io.to_color(opened, channels)
    image = crop(image, side, side) if side else image
    return np.asarray(image).reshape(*image.size[::-1], channels)


def _decode(path: str, side: int, channels: int) -> np.ndarray:
  """Returns an image as `decode` does.

  Raises:
    UserError: the file cannot be read; the message starts with its path.
  """
  try:
    return decode(path, side, channels)
  except UNREADABLE as error:
    reason = bounded.short(error) or type(error).__name__
    raise UserError(
      f"{path} cannot be read ({reason}); replace or remove it"
    ) from error
