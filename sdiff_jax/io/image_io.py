"""Pictures: grids of samples, PNG files with a description, animations."""

import math
import os
import pathlib

import numpy as np
from PIL import Image, PngImagePlugin

GAP = 2  # pixels between the cells of a grid
GAP_COLOR = 128  # mid-grey: visible on light and on dark pages
ABOUT = "Description"  # a keyword of the PNG standard
CELL = 32  # pixels; smaller images are enlarged to at least this side


def grid(
  images: np.ndarray, columns: int | None = None, scale: int | None = None
) -> np.ndarray:
  """Tiles images row by row into one picture.

  Args:
    images: uint8 [N, H, W, C] with C = 1 or 3.
    columns: images in a row; as square a grid as possible by default.
    scale: whole factor of enlargement; by default cells get sides of 32 or more.

  Returns:
    uint8 [H', W', 3], with gaps of two pixels between the cells.
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
  """Writes uint8 [H, W, C], C = 1 or 3, as a PNG, whole or not at all.

  Args:
    path: its directory is made if needed.
    image: the pixels.
    about: a text that is kept inside the file (see `about`); "" for none.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if image.shape[-1] == 1:
    image = image[..., 0]
  texts = PngImagePlugin.PngInfo()
  if about:
    texts.add_text(ABOUT, about)
  temporary = path.with_name(path.name + ".tmp")
  Image.fromarray(image).save(temporary, format="PNG", pnginfo=texts)
  os.replace(temporary, path)


def about(path: str | os.PathLike) -> str:
  """Returns the text inside a PNG, "" where there is none.

  Raises:
    OSError: the file cannot be read, or is no image.
  """
  with Image.open(path) as opened:
    return opened.info.get(ABOUT, "")


def save_gif(
  path: str | os.PathLike, films: list[list[np.ndarray]], rate: float
) -> None:
  """Writes films, side by side, as one animation; those that end early stand still.

  Args:
    path: of the file.
    films: pictures of each film, uint8 [H, W, 3].
    rate: pictures a second.
  """
  pictures = [
    Image.fromarray(grid(np.stack([film[min(k, len(film) - 1)] for film in films])))
    for k in range(max(map(len, films)))
  ]
  first, *others = pictures
  first.save(path, save_all=True, append_images=others, duration=1000 / rate, loop=0)
