"""1797 handwritten digits of 8 x 8 pixels that ship inside scikit-learn."""

import numpy as np
from sklearn import datasets

from sdiff_jax import registry
from sdiff_jax.data.pipeline import Dataset, checked


@registry.register("data", "digits")
def build(
  *, mean: tuple[float, ...] = (-0.39,), std: tuple[float, ...] = (0.75,)
) -> Dataset:
  """Returns the digits.

  Args:
    mean: mean of the pixels in [-1, 1].
    std: standard deviation of the pixels in [-1, 1].
  """
  digits = datasets.load_digits()
  images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  labels = digits.target.astype(np.int32)

  def take(chosen: np.ndarray) -> tuple[np.ndarray, dict]:
    return images[chosen], {"label": labels[chosen]}

  return checked(Dataset(take, len(images), images.shape[1:], 10, mean, std))
