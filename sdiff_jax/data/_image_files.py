"""Which images a folder holds, and the class of each.

Two layouts are read: one sub-folder for each class, with images at any depth, and the
layout of EDM, EDM2 and StyleGAN, whose sub-folders are chunks and whose classes are listed
in dataset.json.
"""

import itertools
import os
import re
import sys
from typing import NamedTuple

import msgspec
import numpy as np

from sdiff_jax.io import bounded
from sdiff_jax.types import Json, UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
INDEX = "dataset.json"
MAX_INDEX = 2**30  # bytes
# A class embedding is allocated for every class, and a label costs a few bytes. So the
# number of classes is at most this, or the number of samples if that is larger.
MAX_CLASSES = 2**15
NUM_NAMED = 3  # files that are named in the message about those that are not read
CHUNK = re.compile(r"\d{4,}")  # name of a chunk: 00000, 00001, ...
NUMBERED = re.compile(r"img\d{6,}\.\w+")  # name of an image in a chunk


class ImageFiles(NamedTuple):
  """The images of a folder.

  Attributes:
    paths: of the N images.
    labels: class of each image, int32 [N].
    num_classes: number of classes.
    unread: files and folders that hold no image that is read, relative to the folder.
  """

  paths: list[str]
  labels: np.ndarray
  num_classes: int
  unread: list[str]


class _Index(msgspec.Struct):
  """Content of dataset.json: pairs of a file name and its label, or null."""

  labels: list[tuple[str, Json]] | None = None


def find(folder: str) -> ImageFiles:
  """Returns the images of a folder with their classes.

  Args:
    folder: with dataset.json; or with a sub-folder for each class, whose images may lie in
      further folders; or, without sub-folders, with the images of one class.

  Raises:
    ValueError: the folder is missing, has no images, or has chunks without dataset.json;
      the message starts with the argument `dir`.
    UserError: dataset.json is damaged, or does not fit the images.
  """
  if not os.path.isdir(folder):
    hint = "; unpack it" if folder.endswith(".zip") and os.path.exists(folder) else ""
    raise ValueError(
      f"dir={folder!r}: is not a folder{hint}; name one with a sub-folder of images for "
      "each class"
    )
  if os.path.lexists(os.path.join(folder, INDEX)):
    return _indexed(folder)
  names, unread = _sub_folders(folder)
  folders = [os.path.join(folder, name) for name in names] or [folder]
  classes = [_images_below(path) for path in folders]
  for path, (images, others) in zip(folders, classes, strict=True):
    if not images:
      raise ValueError(
        f"dir={folder!r}: no images in {path}; put {', '.join(ENDINGS)} files there, or "
        "remove it"
      )
    relative = os.path.relpath(path, folder)
    unread += [os.path.normpath(os.path.join(relative, name)) for name in others]
  if names:
    images, others = _images(folder)
    if images:
      raise ValueError(
        f"dir={folder!r}: has images beside its sub-folders; move them into the "
        "sub-folder of their class"
      )
    unread += [name for name in others if name not in names]
  _check_no_chunks(folder, names, [images for images, _ in classes])
  counts = [len(images) for images, _ in classes]
  return ImageFiles(
    [
      os.path.join(path, name)
      for path, (images, _) in zip(folders, classes, strict=True)
      for name in images
    ],
    np.repeat(np.arange(len(classes), dtype=np.int32), counts),
    len(classes),
    sorted({*unread}),
  )


def report_unread(folder: str, unread: list[str]) -> None:
  """Prints on stderr how many files of a folder are not read, and names some."""
  if not unread:
    return
  named = ", ".join(bounded.short(name, 60) for name in unread[:NUM_NAMED])
  more = f" and {len(unread) - NUM_NAMED} more" if len(unread) > NUM_NAMED else ""
  print(
    f"{folder}: {len(unread)} entries are not read: {named}{more}; images are "
    f"{', '.join(ENDINGS)} files that are not hidden",
    file=sys.stderr,
  )


def check_num_classes(labels: np.ndarray, path: str) -> int:
  """Returns the number of classes of labels, the largest plus one.

  Args:
    labels: integers [N].
    path: of their file, for the message.

  Raises:
    UserError: a label is negative, or too large for the number of samples.
  """
  low, high = int(labels.min()), int(labels.max())
  limit = max(MAX_CLASSES, len(labels))
  if low < 0:
    raise UserError(f"{path}: a label is {low}; number them from 0")
  if high >= limit:
    raise UserError(
      f"{path}: a label is {high}; {len(labels)} samples may have labels up to "
      f"{limit - 1}: number the classes from 0"
    )
  return high + 1


def _sub_folders(folder: str) -> tuple[list[str], list[str]]:
  """Returns the names of the folders in a folder, and of those that are hidden."""
  with os.scandir(folder) as entries:
    names = sorted(entry.name for entry in entries if _is_folder(entry))
  hidden = [name for name in names if name.startswith(".")]
  return [name for name in names if name not in hidden], hidden


def _is_folder(entry: os.DirEntry) -> bool:
  """Returns whether an entry is a folder; a link to itself is none."""
  try:
    return entry.is_dir()
  except OSError:
    return False


def _images(folder: str) -> tuple[list[str], list[str]]:
  """Returns the names of the images in a folder, and those of all other entries."""
  names = sorted(os.listdir(folder))
  images = [n for n in names if n.lower().endswith(ENDINGS) and not n.startswith(".")]
  others = {*names} - {*images}
  return images, sorted(others)


def _images_below(folder: str) -> tuple[list[str], list[str]]:
  """Returns the images below a folder, sorted, and what is not read; relative to it.

  Links to folders are not followed, since they may lead in a circle.
  """
  images, unread = [], []
  for parent, folders, _ in os.walk(folder):
    read = [n for n in folders if not n.startswith(".")]
    read = [n for n in read if not os.path.islink(os.path.join(parent, n))]
    found, others = _images(parent)
    others = [n for n in others if n not in read]
    relative = os.path.relpath(parent, folder)
    images += [os.path.normpath(os.path.join(relative, n)) for n in found]
    unread += [os.path.normpath(os.path.join(relative, n)) for n in others]
    folders[:] = read
  return sorted(images), sorted(unread)


def _check_no_chunks(folder: str, names: list[str], images: list[list[str]]) -> None:
  """Refuses chunks of a data set whose dataset.json is missing.

  As classes they would be meaningless: chunk k holds the images from 1000 k on.

  Raises:
    ValueError: the sub-folders are numbered, and all but the last have as many images.
  """
  numbers = [int(name) for name in names if CHUNK.fullmatch(name)]
  consecutive = bool(names) and numbers == list(range(len(names)))
  counts = [len(each) for each in images]
  equal = len({*counts[:-1]}) <= 1 and counts[-1] <= counts[0]
  numbered = all(NUMBERED.fullmatch(name) for name in itertools.chain(*images))
  if consecutive and ((equal and len(names) > 1) or numbered):
    raise ValueError(
      f"dir={folder!r}: its sub-folders {names[0]} to {names[-1]} are chunks, as EDM and "
      f"StyleGAN write them, and {INDEX}, which lists the classes, is missing; put it "
      f'there ({{"labels": null}} for no classes), or rename the sub-folders if they are '
      "classes"
    )


def _indexed(folder: str) -> ImageFiles:
  """Returns the images of a folder whose classes are in dataset.json."""
  path = os.path.join(folder, INDEX)
  try:
    index = msgspec.json.decode(bounded.read(path, MAX_INDEX), type=_Index)
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(
      f"{path} is damaged ({bounded.short(error)}); it must hold "
      '{"labels": [["00000/img00000000.png", 0], ...]}'
    ) from error
  names, unread = _images_below(folder)  # in the order of EDM
  unread = [name for name in unread if name != INDEX]
  if not names:
    raise ValueError(f"dir={folder!r}: no images; put {', '.join(ENDINGS)} files there")
  paths = [os.path.join(folder, name) for name in names]
  if index.labels is None:
    return ImageFiles(paths, np.zeros(len(paths), np.int32), 1, unread)
  labels = {os.path.normpath(name.replace("\\", "/")): k for name, k in index.labels}
  if len(labels) < len(index.labels):
    raise UserError(f"{path} lists a file twice")
  missing = [name for name in names if name not in labels]
  if missing:
    raise UserError(
      f"{path} has no label of {bounded.short(missing[0], 60)} and of "
      f"{len(missing) - 1} more; add them"
    )
  unread += sorted(
    f"{bounded.short(k, 60)} (missing)" for k in labels.keys() - {*names}
  )
  values = [labels[name] for name in names]
  for value in values:
    if type(value) is not int or abs(value) >= 2**62:
      raise UserError(
        f"{path}: a label is {bounded.short(repr(value), 60)}; labels must be integers"
      )
  numbers = np.array(values, np.int64)
  num_classes = check_num_classes(numbers, path)
  return ImageFiles(paths, numbers.astype(np.int32), num_classes, unread)
