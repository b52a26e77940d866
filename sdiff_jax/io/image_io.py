"""Image files: grids of samples, PNG files with a description, animations."""

import contextlib
import io
import math
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from sdiff_jax.io import bounded, file_io

GAP = 2  # pixels between the cells of a grid
GAP_COLOR = 128  # mid-gray: visible on light and on dark pages
ABOUT = "Description"  # keyword of the PNG standard
CELL = 32  # pixels; smaller images are enlarged to sides of at least this
# Formats that are read. Without this list Pillow guesses among some forty formats, of
# which one starts another program.
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 2**26  # of an image that is read
MAX_FILE = 2**28  # bytes
MAX_SCANS = 100  # of a progressive JPEG
# Keys of Pillow's `Image.info` that may hold an orientation.
ORIENTED = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
# What Pillow raises on files that are no images, or damaged ones.
UNREADABLE = (
  *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, KeyError, IndexError),
  *(TypeError, AttributeError, OverflowError, MemoryError, ZeroDivisionError),
  *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


@contextlib.contextmanager
def open_image(
  file: str | os.PathLike | BinaryIO, formats: Sequence[str] = FORMATS
) -> Iterator[Image.Image]:
  """Opens an image of one of the supported formats, whose pixels are not yet decoded.

  Args:
    file: a path, or an open file in memory.
    formats: Pillow's names of the formats.

  Raises:
    ValueError: the image, its file or the number of its scans is too large.
    UserError: the path is no regular file.
    OSError: the file cannot be read, or is of another format (see UNREADABLE).
  """
  if isinstance(file, str | os.PathLike):
    data = bounded.read(file, MAX_FILE)
  else:
    data = file.read()
  try:
    opened = Image.open(io.BytesIO(data), formats=formats)
  except Image.UnidentifiedImageError:
    raise OSError(f"it is no {', '.join(formats)} image") from None
  with opened as image:
    check_size(*image.size)
    # Each scan of a progressive JPEG visits all pixels and may have a few bytes.
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
      raise ValueError(f"the image has more than {MAX_SCANS} scans")
    yield image


def check_size(width: int, height: int) -> None:
  """Raises a ValueError if an image has more pixels than are read."""
  if width * height > MAX_PIXELS:
    raise ValueError(
      f"an image of {width} x {height} pixels is too large; at most {MAX_PIXELS} pixels "
      "are read"
    )


def to_color(image: Image.Image, channels: int = 3) -> Image.Image:
  """Returns an image in RGB or gray, upright and on white.

  The orientation of EXIF is applied. Transparent pixels are composited over white, since
  the colors below alpha 0 are arbitrary. Of 16 bits in a pixel the lower 8 are dropped.

  Args:
    image: an image of any mode.
    channels: 3 for RGB, 1 for gray.
  """
  image.load()
  if not ORIENTED.isdisjoint(image.info):
    image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I"):  # convert() would clip at 255 instead
    levels, clear = np.asarray(image), image.info.get("transparency")
    high = (levels >> 8).astype(np.uint8)
    if isinstance(clear, int):
      high[levels == clear] = 255
    image = Image.fromarray(high)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return image.convert("L" if channels == 1 else "RGB")


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


def png(image: np.ndarray) -> bytes:
  """Returns an image as the content of a PNG file.

  Args:
    image: uint8 [H, W, C] with C = 1 or 3.

  Example:
    >>> png(np.zeros((8, 8, 1), np.uint8))[1:4]
    b'PNG'
  """
  buffer = io.BytesIO()
  squeezed = image[..., 0] if image.shape[-1] == 1 else image
  Image.fromarray(squeezed).save(buffer, format="PNG")
  return buffer.getvalue()


def about(path: str | os.PathLike) -> str:
  """Returns the text stored inside a PNG file, "" if there is none.

  Raises:
    OSError: the file cannot be read, or is not an image.
  """
  with open_image(path, ("PNG",)) as opened:
    text = opened.info.get(ABOUT, "")
  return text if isinstance(text, str) else ""


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
