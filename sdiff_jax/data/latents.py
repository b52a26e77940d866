"""Latents of images: what an autoencoder's encoder made of them, in ArrayRecord files.

A folder has latents.json, which says what they are, and files of records, each the
label of an image, int32, and the means and standard deviations, float16 [H, W, 2C].
"""

import json
import os
from collections.abc import Callable

import numpy as np

from sdiff_jax import registry
from sdiff_jax.data._codecs import LatentCodec
from sdiff_jax.data._dataset import Dataset, Samples, class_cond
from sdiff_jax.types import Json, UserError

ABOUT = "latents.json"
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
# Lowest pixel of the images that the encoder was given; the highest is 1.
VAE_MIN_PIXEL = {"scm": -1.0, "edm2": 0.0}


@registry.register("data", "latents")
def build(*, dir: str = "", scale: str = "scm") -> Dataset:
  """Returns latents; a batch draws each anew, mean + std eps of its image's posterior.

  Args:
    dir: folder that the job `encode` wrote. It is read record by record.
    scale: what latents are scaled by to standard deviation sigma_d: "scm", for an
      encoder of pixels in [-1, 1], or "edm2", of pixels in [0, 1].

  Raises:
    UserError: files are missing, damaged or of another form, or the scale is unknown
      or not that of the files; later, from `take`, a record cannot be read.
  """
  check_scale(scale)
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

  def read(indices: np.ndarray) -> Samples:
    try:
      rows = np.stack([np.frombuffer(r, np.uint8) for r in records(indices.tolist())])
      moments = rows[:, LABEL.itemsize :].view(MOMENTS).reshape(len(rows), *shape)
    except (RuntimeError, ValueError) as error:  # the first is array_record's
      raise UserError(f"{dir} cannot be read: {error}; encode it again") from error
    labels = rows[:, : LABEL.itemsize].copy().view(LABEL)[:, 0]
    cond = {"label": labels.astype(np.int32)} if about["classes"] else {}
    return moments.astype(np.float32), cond

  read(np.array([0, size - 1]))  # files of another form are refused now
  latents = (*shape[:2], shape[2] // 2)
  codec = LatentCodec(latents, *SCALES[scale], VAE_MIN_PIXEL[scale])
  return Dataset(read, size, class_cond(about["classes"]), codec)


def check_scale(scale: str) -> None:
  """Raises a ValueError for a scale that does not exist."""
  if scale not in SCALES:
    raise ValueError(f"scale={scale!r}: use one of {', '.join(SCALES)}")


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
  # Not file_io.atomic, which would create a folder that is missing.
  temporary = path + ".tmp"
  writer = array_record_module.ArrayRecordWriter(temporary, "group_size:1,uncompressed")
  try:
    for row, label in zip(moments.astype(MOMENTS), labels, strict=True):
      writer.write(np.asarray(label, LABEL).tobytes() + row.tobytes())
    writer.close()
    os.replace(temporary, path)
  except (RuntimeError, OSError) as error:
    raise UserError(f"{path} was not written: {error}") from error


def _about(folder: str) -> dict[str, Json]:
  """Returns what latents.json says, checked."""
  path = os.path.join(folder, ABOUT)
  try:
    with open(path, encoding="utf-8") as file:
      about = json.load(file)
    numbers = [about[k] for k in ("size", "shard_size", "classes")] + about["shape"]
    fits = len(about["shape"]) == 3 and all(isinstance(n, int) for n in numbers)
  except OSError:
    raise ValueError(
      f"dir={folder!r}: has no {ABOUT}; name a folder of latents, which --job=encode "
      "makes"
    ) from None
  except (ValueError, KeyError, TypeError):
    fits = False
  if not fits or min(numbers) < 0 or "scale" not in about:
    raise UserError(f"{path} is damaged; encode the images again")
  return about


def _records(folder: str, about: dict[str, Json]) -> Callable[[list[int]], list[bytes]]:
  """Returns (indices) -> records of all files."""
  from array_record.python import array_record_data_source  # slow

  files = paths(folder, about)
  missing = [path for path in files if not os.path.exists(path)]
  if missing:
    raise UserError(
      f"{missing[0]} is missing, and {len(missing) - 1} more: --job=encode has not "
      "finished; repeat the command to resume it"
    )
  try:
    source = array_record_data_source.ArrayRecordDataSource(files)
  except RuntimeError as error:
    raise UserError(f"{folder} cannot be read: {error}; encode it again") from error
  if len(source) != about["size"]:
    raise UserError(f"{folder} has {len(source)} latents, not {about['size']}")
  return source.__getitems__
