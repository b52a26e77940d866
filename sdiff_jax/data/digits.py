"""1797 handwritten digits of 8 x 8 pixels that ship inside scikit-learn."""

import numpy as np

from sdiff_jax import registry
from sdiff_jax.data._codecs import PixelCodec
from sdiff_jax.data._dataset import Dataset, Samples, class_cond
from sdiff_jax.fields import Means, Scales


@registry.register("data", "digits")
def build(*, mean: Means = (-0.39,), std: Scales = (0.75,)) -> Dataset:
  """Returns the digits.

  Args:
    mean: mean of the pixels in [-1, 1].
    std: standard deviation of the pixels in [-1, 1].
  """
  from sklearn import datasets  # slow to import

  digits = datasets.load_digits()
  images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  labels = digits.target.astype(np.int32)

  def read(indices: np.ndarray) -> Samples:
    return images[indices], {"label": labels[indices]}

  codec = PixelCodec(images.shape[1:], mean, std)
  return Dataset(read, len(images), class_cond(10), codec)
