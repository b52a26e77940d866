"""Data sets of TensorFlow Datasets, read from ArrayRecord files without TensorFlow."""

import io
from types import ModuleType

import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import folder
from sdiff_jax.data._codecs import PixelCodec
from sdiff_jax.data._dataset import Dataset, Samples, class_cond
from sdiff_jax.types import UserError


@registry.register("data", "tfds")
def build(
  *,
  tfds_name: str = "cifar10",
  dir: str = "",
  split: str = "train",
  image_size: int = 0,
  mean: tuple[float, ...] = (-0.017, -0.036, -0.107),
  std: tuple[float, ...] = (0.494, 0.487, 0.523),
) -> Dataset:
  """Returns a data set with features `image` and, if it has classes, `label`.

  Args:
    tfds_name: data set, with config and version where it has them, as in
      "downsampled_imagenet/64x64:2.0.0".
    dir: where it was prepared; "" for TFDS_DATA_DIR or ~/tensorflow_datasets.
    split: such as "train" or "train[:90%]".
    image_size: side that images are resized and cropped to, pixels; 0 for as they
      are.
    mean: mean of the pixels in [-1, 1], one for all or one a channel.
    std: their standard deviation.

  Raises:
    UserError: the data set was not prepared, or has no such split, images or sizes;
      later, from `take`, its files are damaged.
  """
  import tensorflow_datasets as tfds  # slow, and needed only here

  if image_size < 0:
    raise ValueError(f"image_size={image_size}: must not be negative")
  builder = _builder(tfds, tfds_name, dir)
  height, width, channels = _shape(tfds, builder, tfds_name)
  if image_size:
    height = width = image_size
  elif not (height and width):
    raise ValueError(
      f"image_size=0: images of {tfds_name} differ in size; set it, such as to 64"
    )
  examples = _examples(tfds, builder, split)
  label = dict(builder.info.features).get("label")
  num_classes = label.num_classes if isinstance(label, tfds.features.ClassLabel) else 0

  def read(indices: np.ndarray) -> Samples:
    try:
      batch = examples.__getitems__(indices.tolist())
      files = [io.BytesIO(example["image"]) for example in batch]
      images = [folder.decode(file, image_size, channels) for file in files]
    except (RuntimeError, *folder.UNREADABLE) as error:  # the first is array_record's
      raise UserError(
        f"{builder.data_dir} cannot be read ({error}); remove it and prepare it again"
      ) from error
    cond = {}
    if num_classes:
      cond["label"] = np.asarray([example["label"] for example in batch], np.int32)
    return np.stack(images), cond

  read(np.array([0, len(examples) - 1]))  # files that are missing show now
  shape = (height, width, channels)
  return Dataset(
    read, len(examples), class_cond(num_classes), PixelCodec(shape, mean, std)
  )


def _builder(tfds: ModuleType, name: str, data_dir: str) -> object:
  """Returns what reads a prepared data set, from its files alone.

  Raises:
    UserError: it was not prepared, or in files without random access.
  """
  where = f" --data_dir={data_dir}" if data_dir else ""
  how = (
    f"prepare it, in an environment that has TensorFlow: `tfds build {name}{where} "
    "--file_format=array_record`"
  )
  from_files = tfds.core.read_only_builder.builder_from_files
  try:
    builder = from_files(name, data_dir=data_dir or None)
  except tfds.core.DatasetNotFoundError:
    place = f"below dir={data_dir!r}" if data_dir else "prepared on this machine"
    raise ValueError(f"tfds_name={name!r}: is not {place}; {how}") from None
  if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
    raise ValueError(
      f"tfds_name={name!r}: {builder.data_dir} is "
      f"{builder.info.file_format.value}, which has no random access; {how}"
    )
  return builder


def _shape(tfds: ModuleType, builder: object, name: str) -> tuple:
  """Returns (H, W, C) of the images; H and W may be None.

  Raises:
    UserError: there are no images, or images of other channels than 1 or 3.
  """
  image = dict(builder.info.features).get("image")
  if not isinstance(image, tfds.features.Image) or image.shape[-1] not in (1, 3):
    raise ValueError(
      f"tfds_name={name!r}: has no grey or RGB feature `image`, only "
      f"{', '.join(builder.info.features)}; use another data set"
    )
  return image.shape


def _examples(tfds: ModuleType, builder: object, split: str) -> object:
  """Returns the examples of a split, images as the bytes of their files.

  Raises:
    UserError: there is no such split, or nothing in it.
  """
  as_bytes = {"image": tfds.decode.SkipDecoding()}
  try:
    return builder.as_data_source(split, decoders=as_bytes)
  except ValueError:
    raise ValueError(
      f"split={split!r}: use one of {', '.join(builder.info.splits)}, or a part of it "
      "such as train[:90%]"
    ) from None
