"""Image files: grids of samples, PNG files with a description, animations."""

import math
import os

import numpy as np
from PIL import Image, PngImagePlugin

from sdiff_jax.io import file_io

GAP = 2  # pixels between the cells of a grid
GAP_COLOR = 128  # mid-gray: visible on light and on dark pages
ABOUT = "Description"  # keyword of the PNG standard
CELL = 32  # pixels; smaller images are enlarged to sides of at least this


def grid(
  images: np.ndarray, columns: int | None = None, scale: int | None = None
) -> np.ndarray:
  """Tiles images row by row into one image.

  Args:
    images: uint8 [N, H, W, C] with C = 1 or 3.
    columns: images in a row; by default the grid is as square as possible.
    scale: integer factor of enlargement; by default cells have sides of at least 32.

  Returns:
    uint8 [H', W', 3], with gaps of two pixels between the cells.

  Example:
    >>> grid(np.zeros((4, 8, 8, 1), np.uint8)).shape
    (66, 66, 3)
  """
  count, height, width, _ = images.shape
  columns = columns or math.ceil(math.sqrt(count))
  scale = scale or math.ceil(CELL / min(height, width))
  rows = math.ceil(count / columns)
  images = np.broadcast_to(images, (count, height, width, 3))
  images = images.repeat(scale, axis=1).repeat(scale, axis=2)
  pitch_y, pitch_x = height * scale + GAP, width * scale + GAP
  canvas = np.full((rows * pitch_y, columns * pitch_x, 3), GAP_COLOR, np.uint8)
  for k, image in enumerate(images):
    y, x = k // columns * pitch_y, k % columns * pitch_x
    canvas[y : y + height * scale, x : x + width * scale] = image
  return canvas[:-GAP, :-GAP]


def save_png(path: str | os.PathLike, image: np.ndarray, about: str = "") -> None:
  """Writes an image as a PNG file, atomically.

  Args:
    path: the file; missing parent directories are created.
    image: uint8 [H, W, C] with C = 1 or 3.
    about: a text that is stored inside the file (see `about`); "" for none.
  """
  if image.shape[-1] == 1:
    image = image[..., 0]
  texts = PngImagePlugin.PngInfo()
  if about:
    texts.add_text(ABOUT, about)
  with file_io.atomic(path) as temporary:
    Image.fromarray(image).save(temporary, format="PNG", pnginfo=texts)


def about(path: str | os.PathLike) -> str:
  """Returns the text stored inside a PNG file, "" if there is none.

  Raises:
    OSError: the file cannot be read, or is not an image.
  """
  with Image.open(path) as opened:
    return opened.info.get(ABOUT, "")


def save_gif(
  path: str | os.PathLike, videos: list[list[np.ndarray]], rate: float
) -> None:
  """Writes videos side by side as one GIF; videos that end early keep their last frame.

  Args:
    path: of the file.
    videos: the frames of each video, uint8 [H, W, 3].
    rate: frames per second.
  """
  frames = [
    Image.fromarray(grid(np.stack([video[min(k, len(video) - 1)] for video in videos])))
    for k in range(max(map(len, videos)))
  ]
  first, *others = frames
  options = {"append_images": others, "duration": 1000 / rate, "loop": 0}
  with file_io.atomic(path) as temporary:
    first.save(temporary, format="GIF", save_all=True, **options)
