"""1797 handwritten digits of 8 x 8 pixels that ship inside scikit-learn."""

import importlib.util
import pathlib

import numpy as np

from sdiff_jax import registry
from sdiff_jax.data._codecs import PixelCodec
from sdiff_jax.data._dataset import Dataset, Samples, class_cond
from sdiff_jax.fields import Means, Scales
from sdiff_jax.io import bounded


@registry.register("data", "digits")
def build(*, mean: Means = (-0.39,), std: Scales = (0.75,)) -> Dataset:
  """Returns the digits.

  Args:
    mean: mean of the pixels in [-1, 1].
    std: standard deviation of the pixels in [-1, 1].
  """
  lines = bounded.read_gzip(_path()).decode().split()
  table = np.array([line.split(",") for line in lines]).astype(np.uint8)
  images = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
  labels = table[:, -1].astype(np.int32)

  def read(indices: np.ndarray) -> Samples:
    return images[indices], {"label": labels[indices]}

  codec = PixelCodec(images.shape[1:], mean, std)
  return Dataset(read, len(images), class_cond(10), codec)


def _path() -> pathlib.Path:
  """Returns the file of the digits: 64 pixels from 0 to 16 and a label in each line.

  scikit-learn is found and not imported, which would take a second.
  """
  spec = importlib.util.find_spec("sklearn")
  if spec is None or spec.origin is None:
    raise ModuleNotFoundError("the digits ship with it: pip install scikit-learn")
  return pathlib.Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
