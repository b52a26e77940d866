"""Images in .npz files, such as those that the job `sample` writes."""

import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import _image_files, image_shards
from sdiff_jax.data._codecs import PixelCodec
from sdiff_jax.data._dataset import Dataset, Samples, class_cond
from sdiff_jax.fields import Means, Path, Scales
from sdiff_jax.io import array_io, storage
from sdiff_jax.types import UserError


@registry.register("data", "npz")
def build(
  *,
  path: Path = "",
  mean: Means = (0.0,),
  std: Scales = (0.5,),
) -> Dataset:
  """Returns the images of a file, with classes 0 up to the largest label.

  Args:
    path: .npz with images uint8 [N, H, W, C] (arr_0 or images) and, if they have
      classes, integers [N] (arr_1 or labels); or the folder samples.parts that the job
      `sample` of several processes leaves.
    mean: mean of the pixels in [-1, 1], one for all or one for each channel.
    std: standard deviation of the pixels in [-1, 1], likewise.

  Raises:
    UserError: the file is missing or damaged, or its arrays are of another form.
  """
  if not path:
    raise ValueError("path='': name an .npz of uint8 NHWC images")
  if isinstance(path, str) and storage.isdir(path):
    return _sharded(path, mean, std)
  images, labels = _load(path)
  if images is None:
    raise UserError(f"{path} has no images: save them as arr_0 or images")
  if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
    raise UserError(
      f"{path}: images are {images.dtype} {images.shape}; save uint8 [N, H, W, C]"
    )
  _check_channels(path, images.shape)
  if labels is None:
    num_classes, labels = 0, np.full(len(images), -1)
  elif labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
    raise UserError(
      f"{path}: labels are {labels.dtype} {labels.shape}; save integers, one for each "
      f"of the {len(images)} images"
    )
  else:
    num_classes = _image_files.check_num_classes(labels, path)
  labels = labels.astype(np.int32)

  def read(indices: np.ndarray) -> Samples:
    cond = {"label": labels[indices]} if num_classes else {}
    return images[indices], cond

  codec = PixelCodec(images.shape[1:], mean, std)
  return Dataset(read, len(images), class_cond(num_classes), codec)


def _sharded(path: str, mean: Means, std: Scales) -> Dataset:
  """Returns the images of a folder of many .npz files."""
  index = image_shards.read(path)
  _check_channels(path, index.shape)
  labels, num_classes = index.labels.astype(np.int32), 0
  if labels.max() >= 0:
    num_classes = _image_files.check_num_classes(labels, path)
  images = image_shards.reader(path, index)

  def read(indices: np.ndarray) -> Samples:
    return images(indices), {"label": labels[indices]} if num_classes else {}

  return Dataset(
    read,
    len(labels),
    class_cond(num_classes),
    PixelCodec(index.shape, mean, std),
    lambda: image_shards.fingerprint(path, index),
  )


def _check_channels(path: str, shape: tuple[int, ...]) -> None:
  """Raises a UserError for images that are neither gray nor in color."""
  if shape[-1] not in (1, 3):
    raise UserError(
      f"{path}: images {shape} have {shape[-1]} channels; save 1 or 3, as the last axis"
    )


def _load(path: str) -> tuple[np.ndarray | None, np.ndarray | None]:
  """Returns images and labels of a file, None for what it does not have."""
  if not isinstance(path, str) or not storage.lexists(path):
    raise ValueError(f"path={path!r}: does not exist")
  arrays = array_io.read_npz(path, ("arr_0", "images", "arr_1", "labels"))
  images = arrays.get("arr_0", arrays.get("images"))
  return images, arrays.get("arr_1", arrays.get("labels"))
