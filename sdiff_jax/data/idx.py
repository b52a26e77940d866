"""Images in the files of MNIST: train-images-idx3-ubyte[.gz] and its siblings."""

import math
import os
import zlib
from typing import Annotated, Literal

import numpy as np
from PIL import Image

from sdiff_jax import registry
from sdiff_jax.data import _image_files, folder
from sdiff_jax.data._codecs import PixelCodec
from sdiff_jax.data._dataset import Dataset, Samples, class_cond
from sdiff_jax.fields import Count, Means, Path, Range, Scales
from sdiff_jax.io import bounded, storage
from sdiff_jax.types import UserError

FOLDER = "/usr/share/datasets/fashion-mnist"
PREFIX = {"train": "train", "test": "t10k"}


@registry.register("data", "idx")
def build(
  *,
  dir: Path = FOLDER,
  split: Literal["train", "test"] = "train",
  classes: Count = 10,
  image_size: Annotated[int, Range(0, folder.MAX_SIDE)] = 0,
  mean: Means = (-0.428,),
  std: Scales = (0.706,),
) -> Dataset:
  """Returns MNIST, Fashion-MNIST or another data set in their format.

  Args:
    dir: folder of the files, compressed or not; by default the Fashion-MNIST of Debian.
    split: "train" or "test".
    classes: number of labels.
    image_size: side to resize to, averaging areas, pixels; 0 for as it is.
    mean: mean of the pixels in [-1, 1].
    std: standard deviation of the pixels in [-1, 1].

  Raises:
    UserError: a file is missing, cut short or of another format.
  """
  images = _read(dir, f"{PREFIX[split]}-images-idx3-ubyte", 3)[..., None]
  labels = _read(dir, f"{PREFIX[split]}-labels-idx1-ubyte", 1).astype(np.int32)
  if len(images) != len(labels):
    raise UserError(
      f"{dir}: {len(images)} images but {len(labels)} labels of split {split!r}; "
      "take both files from one data set"
    )
  limit = max(_image_files.MAX_CLASSES, len(labels))
  if classes > limit:
    raise ValueError(f"classes={classes}: must be from 1 to {limit}")
  if labels.max() >= classes:
    raise ValueError(
      f"classes={classes}: {dir} has the label {labels.max()}; "
      f"set it to {labels.max() + 1} or more"
    )
  height, width = (image_size, image_size) if image_size else images.shape[1:3]
  codec = PixelCodec((height, width, 1), mean, std)
  if image_size:
    bounded.check_memory(len(images) * image_size**2, f"image_size={image_size}:")
    images = _resize(images, image_size)

  def read(indices: np.ndarray) -> Samples:
    return images[indices], {"label": labels[indices]}

  return Dataset(read, len(images), class_cond(classes), codec)


def _read(folder: str, name: str, axes: int) -> np.ndarray:
  """Returns the array uint8 of an IDX file with `axes` axes.

  The header is big-endian: 0, 0, 8 for unsigned bytes, the number of axes, and the
  size of each axis in four bytes.
  """
  path, data = _bytes(folder, name)
  magic = bytes((0, 0, 8, axes))
  if data[:4] != magic:
    found = data[:4].hex() or "nothing"
    raise UserError(
      f"{path} starts with {found} and not {magic.hex()}: it is no "
      f"{name.split('-', 1)[1]} file; fetch it again"
    )
  start = 4 + 4 * axes
  header = data[4:start].ljust(4 * axes, b"\0")  # cut short: no images, refused below
  shape = tuple(int(n) for n in np.frombuffer(header, ">u4"))
  if not math.prod(shape) or len(data) - start != math.prod(shape):
    raise UserError(
      f"{path} holds {max(len(data) - start, 0)} bytes where its header says "
      f"{' x '.join(map(str, shape))}: it is damaged; fetch it again"
    )
  return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _bytes(folder: str, name: str) -> tuple[str, bytes]:
  """Returns the path of a file, compressed or not, and its content."""
  path = os.path.join(folder, name)
  if not storage.lexists(path):
    path += ".gz"
  try:
    if path.endswith(".gz"):
      return path, bounded.read_gzip(path)
    with bounded.open_regular(path) as file:
      size = bounded.stored_size(file)
      bounded.check_memory(size)
      return path, file.read(size)
  except FileNotFoundError:
    raise ValueError(
      f"dir={folder!r}: has no {name}[.gz]; put it there, or install Fashion-MNIST, "
      f"`apt-get install -y dataset-fashion-mnist`, which is in {FOLDER}"
    ) from None
  except (EOFError, ValueError, OSError, zlib.error) as error:
    reason = bounded.short(error)
    raise UserError(f"{path} is damaged ({reason}); fetch it again") from error


def _resize(images: np.ndarray, side: int) -> np.ndarray:
  """Returns uint8 [N, side, side, 1] of [N, H, W, 1]: a pixel is an area's average."""
  small = [
    Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    for image in images[..., 0]
  ]
  return np.stack([np.asarray(image) for image in small])[..., None]
