"""Latents of images: what an autoencoder's encoder made of them, in ArrayRecord files.

A folder has latents.json, which says what they are, and files of records, each the
label of an image, int32, and the means and standard deviations, float16 [H, W, 2C].
"""

import hashlib
import math
import os
from collections.abc import Callable
from typing import Annotated, Literal, TypedDict

import msgspec
import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import _image_files
from sdiff_jax.data._codecs import LatentCodec
from sdiff_jax.data._dataset import Dataset, Samples, class_cond
from sdiff_jax.io import bounded, file_io, records
from sdiff_jax.types import Json, UserError

WRITER_OPTIONS = "group_size:1,uncompressed"  # of array_record
ABOUT = "latents.json"
MAX_ABOUT = 2**24  # bytes
LABEL, MOMENTS = np.dtype("<i4"), np.dtype("<f2")
# Mean and standard deviation of every channel of latents of ImageNet 512 x 512 by
# Stable Diffusion's autoencoder (sd-vae-ft-mse), without its factor 0.18215. They
# belong to encoders that were given other pixels, so latents of one are none of the
# other's.
SCALES = {
  # Pixels in [-1, 1], as the autoencoder was trained (arXiv:2410.11081, appendix G).
  "scm": ((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)),
  # Pixels in [0, 1], as EDM2 encodes.
  "edm2": ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)),
}
Count = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
Side = Annotated[int, msgspec.Meta(ge=1, le=2**16)]


class About(TypedDict):
  """Content of latents.json that is used here; the job `encode` writes more.

  Attributes:
    size: number of latents.
    shape: height and width of a latent, and twice the number of its channels.
    scale: see `build`.
    shard_size: number of latents in a file.
    classes: number of classes of the images; 0 for images without.
  """

  size: Count
  shape: Annotated[list[Side], msgspec.Meta(min_length=3, max_length=3)]
  scale: str
  shard_size: Count
  classes: Annotated[int, msgspec.Meta(ge=0, le=2**40)]


# Lowest pixel of the images that the encoder was given; the highest is 1.
Scale = Literal["scm", "edm2"]
VAE_MIN_PIXEL = {"scm": -1.0, "edm2": 0.0}


@registry.register("data", "latents")
def build(*, dir: str = "", scale: Scale = "scm") -> Dataset:
  """Returns latents, of which each batch draws new samples of the posteriors.

  A sample is mean + std eps with normal eps, of the posterior of its image.

  Args:
    dir: folder that the job `encode` wrote. It is read record by record.
    scale: statistics by which latents are scaled to standard deviation sigma_d: "scm",
      for an encoder of pixels in [-1, 1], or "edm2", of pixels in [0, 1].

  Raises:
    ValueError: the scale is unknown or not that of the files, or there are none.
    UserError: files are missing, damaged or of another format; later, when it is read,
      a record is damaged, not finite, or has a label beyond the classes.
  """
  about = _about(dir)
  if about["scale"] != scale:
    raise ValueError(
      f"scale={scale!r}: the latents in {dir} are {about['scale']!r}, encoded from "
      "other pixels"
    )
  shape, size = tuple(about["shape"]), about["size"]
  if shape[-1] != 2 * len(SCALES[scale][0]):
    raise UserError(
      f"{dir}: latents of {shape[-1] // 2} channels; those of {scale!r} have "
      f"{len(SCALES[scale][0])}"
    )
  records = _records(dir, about)
  width = LABEL.itemsize + math.prod(shape) * MOMENTS.itemsize
  classes = about["classes"]

  def read(indices: np.ndarray) -> Samples:
    try:
      stored = records(indices.tolist())
      if any(len(record) != width for record in stored):
        raise ValueError(f"a record has not the {width} bytes of its shape")
      rows = np.stack([np.frombuffer(record, np.uint8) for record in stored])
      moments = rows[:, LABEL.itemsize :].view(MOMENTS).reshape(len(rows), *shape)
      labels = rows[:, : LABEL.itemsize].copy().view(LABEL)[:, 0]
      _check_records(indices, moments, labels, classes)
    # The first is that of array_record.
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
      reason = bounded.short(error)
      raise UserError(f"{dir} cannot be read: {reason}; encode it again") from error
    cond = {"label": labels.astype(np.int32)} if classes else {}
    return moments.astype(np.float32), cond

  read(np.array([0, size - 1]))  # files of another format are refused now
  latents = (*shape[:2], shape[2] // 2)
  codec = LatentCodec(latents, *SCALES[scale], VAE_MIN_PIXEL[scale])

  def fingerprint() -> bytes:
    files = [os.stat(path) for path in (os.path.join(dir, ABOUT), *paths(dir, about))]
    sizes = [(status.st_size, status.st_mtime_ns) for status in files]
    return hashlib.sha256(repr((sizes, scale)).encode()).digest()

  return Dataset(read, size, class_cond(classes), codec, fingerprint)


def _check_records(
  indices: np.ndarray, moments: np.ndarray, labels: np.ndarray, classes: int
) -> None:
  """Raises a ValueError for records whose numbers are no latents."""
  axes = tuple(range(1, moments.ndim))
  finite = np.isfinite(moments).all(axes)
  if not finite.all():
    raise ValueError(f"record {indices[~finite][0]} is not finite")
  negative = (moments[..., moments.shape[-1] // 2 :] < 0).any(axes)
  if negative.any():
    raise ValueError(f"record {indices[negative][0]} has a negative standard deviation")
  outside = (labels < -1) | (labels >= classes)  # -1 is no class
  if classes and outside.any():
    raise ValueError(
      f"record {indices[outside][0]} has the label {labels[outside][0]} of {classes} "
      "classes"
    )


def paths(folder: str, about: dict[str, Json]) -> list[str]:
  """Returns the files of a folder, by the `size` and `shard_size` of its latents."""
  count = -(-about["size"] // about["shard_size"])
  names = (f"latents-{k:05d}-of-{count:05d}.array_record" for k in range(count))
  return [os.path.join(folder, name) for name in names]


def write(path: str, moments: np.ndarray, cond: dict[str, np.ndarray]) -> None:
  """Writes a file of records, whole or not at all.

  Args:
    path: of the file.
    moments: means before standard deviations, [n, H, W, 2C].
    cond: conditions of the images; of them the label, int [n], is stored.

  Raises:
    UserError: the file could not be written.
  """
  from array_record.python import array_record_module

  labels = cond.get("label", np.full(len(moments), -1))
  if not os.path.isdir(os.path.dirname(path)):  # which `atomic` would create
    raise UserError(f"{path} was not written: its folder does not exist")
  try:
    with file_io.atomic(path) as temporary:
      writer = array_record_module.ArrayRecordWriter(temporary, WRITER_OPTIONS)
      for row, label in zip(moments.astype(MOMENTS), labels, strict=True):
        writer.write(np.asarray(label, LABEL).tobytes() + row.tobytes())
      writer.close()
  except RuntimeError as error:  # a full disk, for one
    reason = " ".join(str(error).split())
    raise UserError(f"{path} was not written: {reason[:200]}") from error


def _about(folder: str) -> dict[str, Json]:
  """Returns what latents.json says, checked."""
  path = os.path.join(folder, ABOUT)
  if not os.path.lexists(path):
    raise ValueError(
      f"dir={folder!r}: has no {ABOUT}; name a folder of latents, which --job=encode "
      "makes"
    )
  about = records.read(path, About, "encode the images again", max_bytes=MAX_ABOUT)
  limit = max(_image_files.MAX_CLASSES, about["size"])
  if about["classes"] > limit:
    raise UserError(
      f"{path}: classes={about['classes']}: {about['size']} latents have at most {limit}"
    )
  return about | {"shape": tuple(about["shape"])}


def _records(folder: str, about: dict[str, Json]) -> Callable[[list[int]], list[bytes]]:
  """Returns (indices) -> records of all files."""
  from array_record.python import array_record_data_source  # slow

  count = -(-about["size"] // about["shard_size"])
  if count > 10**6:
    raise UserError(f"{os.path.join(folder, ABOUT)}: claims {count} files of records")
  files = paths(folder, about)
  missing = [path for path in files if not os.path.exists(path)]
  if missing:
    raise UserError(
      f"{missing[0]} is missing, and {len(missing) - 1} more: --job=encode has not "
      "finished; repeat the command to resume it"
    )
  stored = 0
  try:
    for path in files:
      with bounded.open_regular(path) as file:
        stored += bounded.stored_size(file)
    needed = about["size"] * math.prod(about["shape"]) * MOMENTS.itemsize
    if needed > bounded.MIN_EXPANDED + bounded.MAX_EXPANSION * stored:
      raise ValueError(f"{needed} bytes of latents in {stored} bytes of records")
    source = array_record_data_source.ArrayRecordDataSource(files)
  except (RuntimeError, ValueError, OSError) as error:
    reason = bounded.short(error)
    raise UserError(f"{folder} cannot be read: {reason}; encode it again") from error
  if len(source) != about["size"]:
    raise UserError(f"{folder} has {len(source)} latents, not {about['size']}")
  return source.__getitems__
