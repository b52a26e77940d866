"""Images in a folder, decoded when they are asked for."""

import os
from typing import BinaryIO

import numpy as np
from PIL import Image

from sdiff_jax import registry
from sdiff_jax.data._codecs import PixelCodec
from sdiff_jax.data._dataset import Dataset, Samples, class_cond
from sdiff_jax.types import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
# What PIL raises on files that are no images, or damaged ones.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@registry.register("data", "folder")
def build(
  *,
  dir: str = "",
  image_size: int = 64,
  channels: int = 3,
  mean: tuple[float, ...] = (0.0,),
  std: tuple[float, ...] = (0.5,),
) -> Dataset:
  """Returns the images below a folder; its sub-folders, sorted, are the classes.

  Args:
    dir: folder of folders of PNG, JPEG or WebP files; without sub-folders, the files
      in it are one class.
    image_size: side that images are resized and cropped to, pixels.
    channels: 3 for RGB, 1 for grey.
    mean: mean of the pixels in [-1, 1], one for all or one a channel.
    std: their standard deviation.

  Raises:
    UserError: the folder is missing or has no images; later, from `take`, a file
      cannot be read.
  """
  if image_size <= 0:
    raise ValueError(f"image_size={image_size}: must be above 0")
  if channels not in (1, 3):
    raise ValueError(f"channels={channels}: use 1 or 3")
  classes, paths = _classes(dir), files(dir)
  counts = [len(paths) for paths in classes]
  labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)

  shape = (image_size, image_size, channels)

  def read(indices: np.ndarray) -> Samples:
    images = np.empty((len(indices), *shape), np.uint8)
    for image, k in zip(images, indices, strict=True):
      try:
        image[...] = decode(paths[k], image_size, channels)
      except UNREADABLE as error:
        message = f"{paths[k]} cannot be read ({error}); replace or remove it"
        raise UserError(message) from error
    return images, {"label": labels[indices]}

  codec = PixelCodec(shape, mean, std)
  return Dataset(read, len(paths), class_cond(len(classes)), codec)


def files(dir: str) -> list[str]:
  """Returns the paths of the images below a folder, in the order of `build`.

  Raises:
    UserError: see `build`.
  """
  return [path for paths in _classes(dir) for path in paths]


def side(folder: str) -> int:
  """Returns the smaller side of the first image of a folder, pixels.

  Raises:
    UserError: there is none, or it cannot be read.
  """
  first = _classes(folder)[0][0]
  try:
    return min(decode(first).shape[:2])
  except UNREADABLE as error:
    raise UserError(f"{first} cannot be read ({error})") from error


def crop(image: Image.Image, side: int) -> Image.Image:
  """Returns the central square of an image, `side` pixels wide, as ADM makes it.

  The image is halved by averages while its smaller side is at least twice `side`,
  resized (bicubic) to a smaller side of `side`, and cropped.
  Source: `center_crop_arr` of guided-diffusion (Dhariwal & Nichol, arXiv:2105.05233).
  """
  while min(image.size) >= 2 * side:
    half = (image.width // 2, image.height // 2)
    image = image.resize(half, Image.Resampling.BOX)
  scale = side / min(image.size)
  size = (round(image.width * scale), round(image.height * scale))
  image = image.resize(size, Image.Resampling.BICUBIC)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  return image.crop((left, top, left + side, top + side))


def _classes(folder: str) -> list[list[str]]:
  """Returns the paths of the images of every class.

  Raises:
    UserError: the folder is missing, or it or a class in it has no images.
  """
  if not os.path.isdir(folder):
    raise ValueError(
      f"dir={folder!r}: is not a folder; name one with a sub-folder of images for each "
      "class"
    )
  names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
  folders = [os.path.join(folder, name) for name in names] or [folder]
  classes = [_images(path) for path in folders]
  for path, files in zip(folders, classes, strict=True):
    if not files:
      raise ValueError(
        f"dir={folder!r}: no images in {path}; put {', '.join(ENDINGS)} files there, or "
        "remove it"
      )
  if names and _images(folder):
    raise ValueError(
      f"dir={folder!r}: has images beside its sub-folders; move them into the "
      "sub-folder of their class"
    )
  return classes


def _images(folder: str) -> list[str]:
  names = sorted(n for n in os.listdir(folder) if n.lower().endswith(ENDINGS))
  return [os.path.join(folder, name) for name in names]


def decode(file: str | BinaryIO, side: int = 0, channels: int = 3) -> np.ndarray:
  """Returns an image file as uint8 [H, W, C]: RGB, or grey for one channel.

  Alpha is dropped, 16 bits a pixel lose the lower 8.

  Args:
    file: a path or an open file.
    side: of the central square to return, pixels; 0 for the whole image.
    channels: C, 1 or 3.

  Raises:
    OSError: the file cannot be read, or another of PIL's errors, see UNREADABLE.
  """
  with Image.open(file) as opened:
    image = opened
    if image.mode.startswith("I"):  # convert() would clip at 255 instead
      image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":  # convert() warns of palettes with alpha
      image = image.convert("RGBA")
    image = image.convert("L" if channels == 1 else "RGB")
    image = crop(image, side) if side else image
    return np.asarray(image).reshape(*image.size[::-1], channels)
