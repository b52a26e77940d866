"""A data set from outside with new conditions trains and samples, without other changes."""

import numpy as np
import pytest

from sdiff_jax import config as configs
from sdiff_jax import registry
from sdiff_jax.data import Dataset, PixelCodec, class_cond
from sdiff_jax.jobs import sample, train
from sdiff_jax.types import CondSpec

SIZE = 12


@registry.register("data", "turned")
def build(*, std: tuple[float, ...] = (0.5,)) -> Dataset:
  """Returns images with a class, an angle and a mask.

  Args:
    std: standard deviation of the pixels.
  """
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (SIZE, 4, 4, 1), dtype=np.uint8)
  values = {
    "label": rng.integers(0, 3, SIZE).astype(np.int32),
    "angle": rng.uniform(0, 3, SIZE).astype(np.float32),
    "mask": rng.random((SIZE, 4, 4)) < 0.5,
  }
  cond = class_cond(3) | {
    "angle": CondSpec((), np.float32),
    "mask": CondSpec((4, 4), np.bool_),
  }
  codec = PixelCodec((4, 4, 1), (0.0,), std)
  return Dataset(
    lambda i: (images[i], {k: v[i] for k, v in values.items()}), SIZE, cond, codec
  )


def test_new_conditions_train_and_sample(tmp_path):
  c = configs.base()
  c.data = configs.component("data", "turned")
  c.model.update(width=16, depth=1, embed=16)
  c.train.update(steps=2, batch_size=8, log_every=1)
  c.sample.update(num=8, batch_size=8)
  c.sampler.update(name="ddim", steps=2)
  train.run(c, str(tmp_path))
  sample.run(c, str(tmp_path))
  with np.load(tmp_path / "samples.npz") as arrays:
    assert arrays["arr_0"].shape == (8, 4, 4, 1)
    assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_conditions_of_samples():
  """Classes in turn, and the other values of the data set's samples."""
  dataset = build()
  cond = dataset.conditions(np.arange(10, 14, dtype=np.int32))
  assert cond["label"].tolist() == [1, 2, 0, 1]
  stored = dataset[np.array([10, 11, 0, 1])][1]
  np.testing.assert_array_equal(cond["angle"], stored["angle"])
  np.testing.assert_array_equal(cond["mask"], stored["mask"])
  absent = Dataset(dataset.read, 0, dataset.cond, dataset.codec)
  with pytest.raises(ValueError, match="cond: values of angle, mask come from"):
    absent.conditions(np.arange(2))
