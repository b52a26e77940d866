"""Latents of images: what an autoencoder's encoder made of them, in ArrayRecord files.

A folder has latents.json, which says what they are, and files of records, each the
label of an image, int32, and the means and standard deviations, float16 [H, W, 2C]. In
place of its label an image may have the number of its caption, see `_text_table`. Images
of networks without an autoencoder are stored as they are, uint8 [H, W, C].
"""

import hashlib
import math
import os
from typing import Annotated, Literal, NotRequired, TypedDict

import msgspec
import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import _array_records, _image_files, _text_table
from sdiff_jax.data._codecs import Codec, LatentCodec, PixelCodec
from sdiff_jax.data._dataset import Dataset, Samples, class_cond
from sdiff_jax.data._text_table import Shapes, TextTable
from sdiff_jax.fields import Path
from sdiff_jax.io import bounded, records, storage
from sdiff_jax.types import CondSpecs, Json, UserError

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
    texts: number of different captions, the empty one first; none for images without.
    text: conditions that a caption is -> their shapes.
    tokens: in place of them, the names of its tokens -> their shapes.
    moments: mean and standard deviation of all latents, for the scale "vae".
  """

  size: Count
  shape: Annotated[list[Side], msgspec.Meta(min_length=3, max_length=3)]
  scale: str
  shard_size: Count
  classes: Annotated[int, msgspec.Meta(ge=0, le=2**40)]
  texts: NotRequired[Count]
  text: NotRequired[dict[str, Annotated[list[Side], msgspec.Meta(max_length=4)]]]
  tokens: NotRequired[dict[str, Annotated[list[Side], msgspec.Meta(max_length=4)]]]
  moments: NotRequired[tuple[float, Annotated[float, msgspec.Meta(gt=0)]]]


CAPTION = "caption"
PIXELS = "pixels"  # the scale of images that are not encoded
Scale = Literal["scm", "edm2", "vae", "pixels"]
# Lowest pixel of the images that the encoder was given; the highest is 1.
VAE_MIN_PIXEL = {"scm": -1.0, "edm2": 0.0, "vae": -1.0}


@registry.register("data", "latents")
def build(*, dir: Path = "", scale: Scale = "scm") -> Dataset:
  """Returns latents, of which each batch draws new samples of the posteriors.

  A sample is mean + std eps with normal eps, of the posterior of its image.

  Args:
    dir: folder that the job `encode` wrote. It is read record by record.
    scale: statistics by which latents are scaled to standard deviation sigma_d: "scm",
      for an encoder of pixels in [-1, 1], or "edm2", of pixels in [0, 1], of ImageNet;
      "vae" for the factor and the shift of the autoencoder, which the networks of its
      folder are trained on; "pixels" for images that are not encoded, in [-1, 1].

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
  shape, size = about["shape"], about["size"]
  codec = _codec(dir, about)
  dtype = np.dtype(np.uint8) if scale == PIXELS else MOMENTS
  files = paths(dir, about)
  bytes_each = math.prod(shape) * dtype.itemsize
  stored_records = _array_records.reader(dir, files, size, bytes_each)
  width, classes = LABEL.itemsize + bytes_each, about["classes"]
  texts = _texts(dir, about)

  def read(indices: np.ndarray) -> Samples:
    try:
      stored = stored_records(indices.tolist())
      if any(len(record) != width for record in stored):
        raise ValueError(f"a record has not the {width} bytes of its shape")
      rows = np.stack([np.frombuffer(record, np.uint8) for record in stored])
      values = rows[:, LABEL.itemsize :].view(dtype).reshape(len(rows), *shape)
      labels = rows[:, : LABEL.itemsize].copy().view(LABEL)[:, 0]
      if scale != PIXELS:
        _check_moments(indices, values)
        values = values.astype(np.float32)
      if texts is not None:
        return values, texts[labels]
      _check_labels(indices, labels, classes)
    # The first is that of array_record.
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
      reason = bounded.short(error)
      raise UserError(f"{dir} cannot be read: {reason}; encode it again") from error
    return values, {"label": labels.astype(np.int32)} if classes else {}

  read(np.array([0, size - 1]))  # files of another format are refused now
  all_files = [os.path.join(dir, ABOUT), *files, *(texts.paths if texts else [])]

  def fingerprint() -> bytes:
    sizes = [storage.version(path) for path in all_files]
    return hashlib.sha256(repr((sizes, scale)).encode()).digest()

  cond: CondSpecs = class_cond(classes) if texts is None else texts.specs()
  whole, rest = divmod(size, about["shard_size"])
  files = (about["shard_size"],) * whole + ((rest,) if rest else ())
  return Dataset(read, size, cond, codec, fingerprint, shards=files)


def _codec(folder: str, about: dict[str, Json]) -> Codec:
  """Returns the codec of the latents of a folder, or of its images."""
  scale, (height, width, depth) = about["scale"], about["shape"]
  if scale == PIXELS:
    return PixelCodec((height, width, depth))
  if depth % 2:
    raise UserError(f"{folder}: latents of {depth} / 2 channels")
  if scale == "vae":
    if "moments" not in about:
      raise UserError(
        f"{os.path.join(folder, ABOUT)}: has no `moments`; encode it again"
      )
    mean, std = ((value,) for value in about["moments"])
  else:
    mean, std = SCALES[scale]
    if depth != 2 * len(mean):
      raise UserError(
        f"{folder}: latents of {depth // 2} channels; those of {scale!r} have {len(mean)}"
      )
  return LatentCodec((height, width, depth // 2), mean, std, VAE_MIN_PIXEL[scale])


def _texts(folder: str, about: dict[str, Json]) -> TextTable | None:
  """Returns the captions of a folder, None for images without."""
  if "texts" not in about:
    return None
  shapes: Shapes = about.get("tokens") or about.get("text", {})
  dtype = _text_table.TOKEN if "tokens" in about else _text_table.FLOAT
  try:
    return TextTable(folder, shapes, about["texts"], about["shard_size"], dtype)
  except ValueError as error:
    raise UserError(f"{folder} cannot be read: {error}; encode it again") from error


def _check_moments(indices: np.ndarray, moments: np.ndarray) -> None:
  """Raises a ValueError for records whose numbers are no latents."""
  axes = tuple(range(1, moments.ndim))
  finite = np.isfinite(moments).all(axes)
  if not finite.all():
    raise ValueError(f"record {indices[~finite][0]} is not finite")
  negative = (moments[..., moments.shape[-1] // 2 :] < 0).any(axes)
  if negative.any():
    raise ValueError(f"record {indices[negative][0]} has a negative standard deviation")


def _check_labels(indices: np.ndarray, labels: np.ndarray, classes: int) -> None:
  """Raises a ValueError for records with a class beyond the classes."""
  outside = (labels < -1) | (labels >= classes)  # -1 is no class
  if classes and outside.any():
    raise ValueError(
      f"record {indices[outside][0]} has the label {labels[outside][0]} of {classes} "
      "classes"
    )


def paths(folder: str, about: dict[str, Json]) -> list[str]:
  """Returns the files of a folder, by the `size` and `shard_size` of its latents."""
  return _array_records.paths(folder, "latents", about["size"], about["shard_size"])


def write(path: str, values: np.ndarray, cond: dict[str, np.ndarray]) -> None:
  """Writes a file of records, whole or not at all.

  Args:
    path: of the file.
    values: means before standard deviations, [n, H, W, 2C], or images uint8.
    cond: conditions of the images; of them "caption", the number of its caption, or else
      the label, int [n], is stored.

  Raises:
    UserError: the file could not be written.
  """
  labels = cond.get(CAPTION, cond.get("label", np.full(len(values), -1)))
  rows = values if values.dtype == np.uint8 else values.astype(MOMENTS)
  pairs = zip(rows, labels.astype(LABEL), strict=True)
  _array_records.write(path, (label.tobytes() + row.tobytes() for row, label in pairs))


def _about(folder: str) -> dict[str, Json]:
  """Returns what latents.json says, checked."""
  path = os.path.join(folder, ABOUT)
  if not storage.lexists(path):
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
