"""Data sets of TensorFlow Datasets, read from ArrayRecord files without TensorFlow."""

import hashlib
import io
import os
from types import ModuleType
from typing import Annotated

import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import _image_files, _tfds_files, folder
from sdiff_jax.data._codecs import PixelCodec
from sdiff_jax.data._dataset import Dataset, Samples, class_cond
from sdiff_jax.fields import Means, Path, Range, Scales
from sdiff_jax.io import bounded, storage
from sdiff_jax.types import UserError

DEFAULT_DIR = "~/tensorflow_datasets"  # of TensorFlow Datasets


@registry.register("data", "tfds")
def build(
  *,
  tfds_name: str = "cifar10",
  dir: Path = "",
  split: str = "train",
  image_size: Annotated[int, Range(0, folder.MAX_SIDE)] = 0,
  mean: Means = (-0.017, -0.036, -0.107),
  std: Scales = (0.494, 0.487, 0.523),
) -> Dataset:
  """Returns a data set with features `image` and, if it has classes, `label`.

  Args:
    tfds_name: data set, with config and version where it has them, as in
      "downsampled_imagenet/64x64:2.0.0".
    dir: where it was prepared; "" for TFDS_DATA_DIR or ~/tensorflow_datasets.
    split: such as "train" or "train[:90%]".
    image_size: side that images are resized and cropped to, pixels; 0 for as they
      are.
    mean: mean of the pixels in [-1, 1], one for all or one for each channel.
    std: standard deviation of the pixels in [-1, 1], likewise.

  Raises:
    ValueError: the data set was not prepared, or has no such split, images or sizes.
    UserError: its files are damaged, or its features are of types that are not read;
      later, when it is read, an example is damaged.
  """
  directory = _directory(tfds_name, dir)
  _tfds_files.check(directory)
  import tensorflow_datasets as tfds  # slow, and needed only here

  builder = _builder(tfds, tfds_name, dir, directory)
  height, width, channels = _shape(tfds, builder, tfds_name)
  if image_size:
    height = width = image_size
  elif not (height and width):
    raise ValueError(
      f"image_size=0: images of {tfds_name} differ in size; set it, such as to 64"
    )
  shape = (height, width, channels)
  codec = PixelCodec(shape, mean, std)
  examples = _examples(tfds, builder, split)
  num_classes = _num_classes(tfds, builder, directory, len(examples))

  def read(indices: np.ndarray) -> Samples:
    try:
      batch = examples.__getitems__(indices.tolist())
      files = [io.BytesIO(example["image"]) for example in batch]
      images = [folder.decode(file, image_size, channels) for file in files]
      for image in images:
        if image.shape != shape:
          raise ValueError(f"an image is {image.shape} and not {shape}")
      cond = {}
      if num_classes:
        labels = np.asarray([example["label"] for example in batch], np.int32)
        if labels.min() < -1 or labels.max() >= num_classes:
          raise ValueError(f"a label is beyond the {num_classes} classes")
        cond["label"] = labels
    # The first is that of array_record.
    except (RuntimeError, *folder.UNREADABLE) as error:
      reason = bounded.short(error) or type(error).__name__
      raise UserError(
        f"{directory} cannot be read ({reason}); remove it and prepare it again"
      ) from error
    return np.stack(images), cond

  read(np.array([0, len(examples) - 1]))  # files that are missing show now

  def fingerprint() -> bytes:
    digest = hashlib.sha256(repr((tfds_name, split, shape)).encode())
    for name in sorted(storage.listdir(directory)):
      version = storage.version(os.path.join(directory, name))
      digest.update(repr((name, *version)).encode())
    return digest.digest()

  return Dataset(read, len(examples), class_cond(num_classes), codec, fingerprint)


def _how(name: str, data_dir: str) -> str:
  """Returns how to prepare a data set."""
  where = f" --data_dir={data_dir}" if data_dir else ""
  return (
    f"prepare it, in an environment that has TensorFlow: `tfds build {name}{where} "
    "--file_format=array_record`"
  )


def _directory(name: str, data_dir: str) -> str:
  """Returns the folder of a prepared data set.

  Raises:
    ValueError: it was not prepared.
  """
  root = data_dir or os.environ.get("TFDS_DATA_DIR") or DEFAULT_DIR
  directory = _tfds_files.find(name, os.path.expanduser(root))
  if directory is None:
    place = f"below dir={data_dir!r}" if data_dir else "prepared on this machine"
    raise ValueError(f"tfds_name={name!r}: is not {place}; {_how(name, data_dir)}")
  return directory


def _builder(tfds: ModuleType, name: str, data_dir: str, directory: str) -> object:
  """Returns what reads a prepared data set, from its files alone.

  Raises:
    ValueError: it is in files without random access.
    UserError: a file is damaged.
  """
  try:
    builder = tfds.builder_from_directory(directory)
    file_format = builder.info.file_format
  except Exception as error:  # whatever damaged descriptions lead to
    reason = bounded.short(error) or type(error).__name__
    raise UserError(
      f"{directory} cannot be read ({reason}); remove it and prepare it again"
    ) from error
  if file_format != tfds.core.FileFormat.ARRAY_RECORD:
    label = file_format.value if file_format else "of no format"
    raise ValueError(
      f"tfds_name={name!r}: {directory} is {label}, which has no random access; "
      f"{_how(name, data_dir)}"
    )
  return builder


def _num_classes(tfds: ModuleType, builder: object, directory: str, size: int) -> int:
  """Returns the number of classes of the feature `label`, 0 if there is none."""
  label = dict(builder.info.features).get("label")
  if not isinstance(label, tfds.features.ClassLabel):
    return 0
  limit = max(_image_files.MAX_CLASSES, size)
  if not 1 <= (label.num_classes or 0) <= limit:
    raise UserError(
      f"{directory}: the feature label has {label.num_classes} classes; {size} examples "
      f"have 1 to {limit}"
    )
  return label.num_classes


def _shape(tfds: ModuleType, builder: object, name: str) -> tuple:
  """Returns (H, W, C) of the images; H and W may be None.

  Raises:
    ValueError: there are no images, or images of other channels than 1 or 3.
  """
  image = dict(builder.info.features).get("image")
  if not isinstance(image, tfds.features.Image) or image.shape[-1] not in (1, 3):
    raise ValueError(
      f"tfds_name={name!r}: has no gray or RGB feature `image`, only "
      f"{', '.join(builder.info.features)}; use another data set"
    )
  return image.shape


def _examples(tfds: ModuleType, builder: object, split: str) -> object:
  """Returns the examples of a split, images as the bytes of their files.

  Raises:
    ValueError: there is no such split, or nothing in it.
    UserError: the files are damaged.
  """
  # Of the other features nothing is decoded, such as compressed arrays.
  plain = (tfds.features.Image, tfds.features.Tensor)
  skipped = {
    name: tfds.decode.SkipDecoding()
    for name, feature in builder.info.features.items()
    if isinstance(feature, plain) and name != "label"
  }
  try:
    return builder.as_data_source(split, decoders=skipped)
  except (RuntimeError, OSError, TypeError, KeyError) as error:
    reason = bounded.short(error)
    raise UserError(
      f"{builder.data_dir} cannot be read ({reason}); remove it and prepare it again"
    ) from error
  except (ValueError, AssertionError):
    raise ValueError(
      f"split={split!r}: use one of {', '.join(builder.info.splits)}, or a part of it "
      "such as train[:90%]"
    ) from None
