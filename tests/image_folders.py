"""Image files of random pixels."""

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
  return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path, array: np.ndarray, **options) -> None:
  path.parent.mkdir(exist_ok=True)
  Image.fromarray(array).save(path, **options)
