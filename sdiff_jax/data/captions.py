"""Images with captions: files beside them, lists of captions, or tars of WebDataset.

Captions become conditions by the job `encode`, which the data set `latents` then reads.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import _image_files, folder
from sdiff_jax.data._codecs import PixelCodec
from sdiff_jax.data._dataset import Dataset, Samples
from sdiff_jax.fields import Means, Path, Range, Scales
from sdiff_jax.io import bounded, downloads, file_io, image_io, storage
from sdiff_jax.types import Json, UserError

LISTS = (".jsonl", ".json")  # of captions
MAX_LIST = 2**30  # bytes
MAX_CAPTION = 2**16  # bytes of a caption in a file of its own
KEYS = ("text", "caption", "prompt")  # of a caption in JSON, the first that is there
NAMES = ("file_name", "image", "path")  # of the file that it belongs to


class _Image(NamedTuple):
  """Where the bytes of an image are: a file, or a part of a tar."""

  path: str
  start: int = 0
  size: int = 0  # 0 for the whole file

  def read(self) -> bytes:
    if not self.size:
      return bounded.read(self.path, image_io.MAX_FILE)
    with open(self.path, "rb") as file:
      file.seek(self.start)
      return file.read(self.size)


@registry.register("data", "captions")
def build(
  *,
  dir: Path = "",
  image_size: Annotated[int, Range(1, folder.MAX_SIDE)] = 256,
  channels: Literal[1, 3] = 3,
  mean: Means = (0.0,),
  std: Scales = (0.5,),
) -> Dataset:
  """Returns the images below a folder with their captions, as `Dataset.captions`.

  Captions are, whichever is there: lists, files .jsonl of {"file_name": ..., "text": ...}
  (as of Hugging Face's imagefolder) or .json of the same in a list, or of {file name:
  caption}; tars with "key.png" and "key.txt" or "key.json" one after the other
  (WebDataset, not compressed); or a file .txt beside each image.

  Args:
    dir: the folder, with PNG, JPEG or WebP files or tars of them, at any depth; in a
      bucket tars alone, which are copied to this machine first, once.
    image_size: side that images are resized and cropped to, pixels.
    channels: 3 for RGB, 1 for gray.
    mean: mean of the pixels in [-1, 1], one for all or one for each channel.
    std: standard deviation of the pixels in [-1, 1], likewise.

  Raises:
    ValueError: the folder is missing, has no images, or some without a caption.
    UserError: a file is damaged; an image only when it is read.
  """
  if not storage.isdir(dir):
    raise ValueError(f"dir={dir!r}: is not a folder; name one of images with captions")
  if any(path.lower().endswith(_image_files.ENDINGS) for path in _remote_files(dir)):
    raise ValueError(f"dir={dir!r}: {folder.PACK}, or in tars")
  here = downloads.local(dir)
  found = dict(_find(here))
  without = [name for name, (_, text) in found.items() if text is None]
  if not found:
    raise ValueError(
      f"dir={dir!r}: no images; put {', '.join(_image_files.ENDINGS)} files or .tar there"
    )
  if without:
    raise ValueError(
      f"dir={dir!r}: no caption of {bounded.short(without[0], 60)} and of "
      f"{len(without) - 1} more; put a .txt beside each image, or a metadata.jsonl with "
      '{"file_name": ..., "text": ...} into the folder'
    )
  names = sorted(found)
  places = [found[name][0] for name in names]
  texts = [" ".join(str(found[name][1]).split()) for name in names]
  shape = (image_size, image_size, channels)

  def read(indices: np.ndarray) -> Samples:
    images = np.empty((len(indices), *shape), np.uint8)
    for image, k in zip(images, indices, strict=True):
      try:
        file = io.BytesIO(places[k].read())
        image[...] = folder.decode(file, image_size, channels)
      except image_io.UNREADABLE as error:
        reason = bounded.short(error) or type(error).__name__
        raise UserError(
          f"{dir}: {names[k]} cannot be read ({reason}); replace or remove it"
        ) from error
    return images, {}

  read(np.array([0, len(names) - 1]))

  def fingerprint() -> bytes:
    digest = hashlib.sha256(repr((shape, texts)).encode("utf-8", "surrogateescape"))
    for path in sorted({place.path for place in places}):
      name = os.path.relpath(path, here)
      entry = (name, *storage.version(os.path.join(dir, name)))
      digest.update(repr(entry).encode("utf-8", "surrogateescape"))
    return digest.digest()

  return Dataset(
    read,
    len(names),
    {},
    PixelCodec(shape, mean, std),
    fingerprint,
    captions=lambda indices: [texts[k] for k in indices],
  )


def _remote_files(dir: str) -> list[str]:
  """Returns all files below a folder of a bucket, [] for one of this machine."""
  return storage.glob(dir, "**") if storage.remote(dir) else []


def _find(dir: str) -> Iterator[tuple[str, tuple[_Image, str | None]]]:
  """Yields name, place and caption of every image below a folder."""
  for parent, folders, files in os.walk(dir):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    files = sorted(name for name in files if not name.startswith("."))
    listed: dict[str, str] = {}
    for name in files:
      if name.endswith(LISTS):
        listed |= _listed(os.path.join(parent, name))
    for name in files:
      path = os.path.join(parent, name)
      relative = os.path.relpath(path, dir)
      if name.endswith(".tar"):
        for key, image in _in_tar(path):
          yield f"{relative}/{key}", image
      elif name.lower().endswith(_image_files.ENDINGS):
        text = f"{os.path.splitext(path)[0]}.txt"
        caption = listed.get(name)
        if caption is None and os.path.exists(text):
          caption = file_io.read_text(text, "replace it", MAX_CAPTION)
        yield relative, (_Image(path), caption)


def _listed(path: str) -> dict[str, str]:
  """Returns file name -> caption of a list of captions."""
  try:
    data = bounded.read(path, MAX_LIST)
    if path.endswith(".jsonl"):
      lines = [line for line in data.splitlines() if line.strip()]
      entries = [msgspec.json.decode(line) for line in lines]
    else:
      entries = msgspec.json.decode(data)
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} is damaged ({bounded.short(error)})") from error
  if isinstance(entries, dict):
    return {k: v for k, v in entries.items() if isinstance(v, str)}
  pairs = [_pair(entry) for entry in entries] if isinstance(entries, list) else []
  return {name: text for name, text in pairs if name is not None and text is not None}


def _pair(entry: Json) -> tuple[str | None, str | None]:
  """Returns file name and caption of an entry of a list, None for what it lacks."""
  values = entry if isinstance(entry, dict) else {}
  found = (
    next((values[key] for key in keys if isinstance(values.get(key), str)), None)
    for keys in (NAMES, KEYS)
  )
  name, text = found
  return name, text


def _in_tar(path: str) -> Iterator[tuple[str, tuple[_Image, str | None]]]:
  """Yields key, place and caption of every image of a tar."""
  images: dict[str, tuple[str, _Image]] = {}
  captions: dict[str, str] = {}
  try:
    with tarfile.open(path, "r:") as tar:
      for member in tar:
        key, _, ending = member.name.partition(".")
        place = _Image(path, member.offset_data, member.size)
        if not member.isfile() or member.size > image_io.MAX_FILE:
          continue
        if f".{ending.lower()}" in _image_files.ENDINGS and member.size:
          images[key] = member.name, place
        elif ending == "txt" and member.size <= MAX_CAPTION:
          captions[key] = place.read().decode() if member.size else ""
        elif ending == "json" and 0 < member.size <= file_io.MAX_BYTES:
          text = _pair(msgspec.json.decode(place.read()))[1]
          if text is not None:
            captions.setdefault(key, text)
  except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} is damaged ({bounded.short(error)})") from error
  for key, (name, place) in images.items():
    yield name, (place, captions.get(key))
