"""Latents in .npy files, and what is drawn of their posteriors."""

import numpy as np
import pytest

from sdiff_jax import config as configs
from sdiff_jax.data import latents, pipeline
from sdiff_jax.interfaces import UserError
from sdiff_jax.jobs import features, inspect, train

RNG = np.random.default_rng(0)
MOMENTS = RNG.standard_normal((7, 4, 6, 8)).astype(np.float16)
MOMENTS[..., 4:] = np.abs(MOMENTS[..., 4:])
LABELS = np.array([2, 0, 1, 1, 0, 2, 5])
OPTIONS = {"seed": 3, "batch_size": 5, "sigma_d": 0.5}


@pytest.fixture
def folder(tmp_path):
  np.save(tmp_path / "moments-0.npy", MOMENTS[:4])
  np.save(tmp_path / "moments-1.npy", MOMENTS[4:])
  np.save(tmp_path / "labels.npy", LABELS)
  return tmp_path


def test_rows_of_all_files(folder):
  source = latents.build(dir=str(folder))
  assert (source.size, source.shape, source.classes) == (7, (4, 6, 4), 6)
  chosen = np.array([6, 3, 4, 0])
  moments, cond = source.take(chosen)
  labels = cond["label"]
  np.testing.assert_array_equal(moments, MOMENTS[chosen])
  assert moments.dtype == np.float32
  np.testing.assert_array_equal(labels, LABELS[chosen])
  assert labels.dtype == np.int32


@pytest.mark.parametrize(
  ("scale", "mean", "std"),
  [
    ("scm", (1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)),
    ("edm2", (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)),
  ],
)
def test_latents_of_these_moments_become_sigma_d(tmp_path, scale, mean, std):
  """A posterior without spread at mean + std maps to sigma_d in every channel."""
  exact = np.concatenate([np.add(mean, std), np.zeros(4)])
  np.save(tmp_path / "moments.npy", np.broadcast_to(exact, (5, 8, 8, 8)))
  np.save(tmp_path / "labels.npy", np.zeros(5, int))
  source = latents.build(dir=str(tmp_path), scale=scale)
  x0 = next(pipeline.batches(source, **OPTIONS))["x0"]
  assert x0.dtype == np.float32
  np.testing.assert_allclose(x0, 0.5, rtol=1e-6)


def test_a_batch_draws_the_posterior(tmp_path):
  shape, rows = (16, 32, 4), np.arange(8)
  mean, std = np.full(shape, 3.0), np.full(shape, 2.0)
  moments = np.broadcast_to(np.concatenate([mean, std], -1), (8, 16, 32, 8))
  moments = moments.astype(np.float32)
  z = pipeline.drawn(moments, 0, 0, rows)
  assert z.dtype == np.float32
  assert abs(z.mean() - 3) < 5 * 2 / z.size**0.5
  assert abs(z.std() / 2 - 1) < 5 / (2 * z.size) ** 0.5
  product = (z[0] - 3).ravel() @ (z[1] - 3).ravel() / 4  # rows are independent
  assert abs(product) < 5 * z[0].size ** 0.5
  for other in ((1, 0), (0, 1)):  # seed, batch
    assert (pipeline.drawn(moments, *other, rows) != z).mean() > 0.99


def test_rows_of_a_process_are_those_of_the_whole_batch(folder):
  source = latents.build(dir=str(folder))
  whole = pipeline.batches(source, **OPTIONS, flip=True)
  part = pipeline.batches(source, **OPTIONS, flip=True, rows=np.array([1, 4]))
  later = pipeline.batches(source, **OPTIONS, flip=True, start=2)
  for k in range(3):
    a, b = next(whole), next(part)
    np.testing.assert_array_equal(a["x0"][[1, 4]], b["x0"])
    assert k < 2 or np.array_equal(a["x0"], next(later)["x0"])


def test_what_needs_pixels_is_refused(folder, tmp_path):
  c = configs.base()
  c.data = configs.use("data", "latents", dir=str(folder))
  c.train.sample_every = 10
  for job in (inspect, features, train):
    with pytest.raises(UserError, match="config.data are latents"):
      job.run(c, str(tmp_path / "run"))
  source = latents.build(dir=str(folder))
  with pytest.raises(UserError, match="config.data are latents"):
    pipeline.decode(source, np.zeros((1, 4, 6, 4), np.float32), 0.5)


@pytest.mark.parametrize(
  ("file", "array", "message"),
  [
    ("moments-1.npy", MOMENTS[:, :2], r"moments-1.npy: float16 \(7, 2, 6, 8\); save"),
    ("moments-1.npy", MOMENTS.astype(int), r"moments-1.npy: int64 .*; save floats"),
    ("moments-0.npy", np.float32(1), r"moments-0.npy: float32 \(\); save floats"),
    ("labels.npy", LABELS[:3], r"labels.npy: int64 \(3,\); save integers from 0"),
    ("labels.npy", LABELS * 1.0, r"labels.npy: float64 \(7,\); save integers"),
    ("labels.npy", LABELS - 1, r"labels.npy: int64 \(7,\); save integers from 0"),
  ],
)
def test_arrays_of_another_form_are_refused(folder, file, array, message):
  np.save(folder / file, array)
  with pytest.raises(UserError, match=message):
    latents.build(dir=str(folder))


def test_other_channels_are_refused(tmp_path):
  np.save(tmp_path / "moments.npy", MOMENTS[..., :6])
  with pytest.raises(UserError, match="6 channels; save the means and the standard"):
    latents.build(dir=str(tmp_path))


def test_missing_and_damaged_files_are_named(folder, tmp_path):
  for empty in ("", str(tmp_path / "none")):
    with pytest.raises(UserError, match=f"dir='{empty}' has no moments"):
      latents.build(dir=empty)
  with pytest.raises(UserError, match="config.data.scale='sd': take one of scm, edm2"):
    latents.build(dir=str(folder), scale="sd")
  path = folder / "moments-1.npy"
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(UserError, match=r"moments-1.npy is no .npy, or damaged"):
    latents.build(dir=str(folder))
  path.unlink()
  (folder / "labels.npy").unlink()
  with pytest.raises(UserError, match=r"labels.npy does not exist: save a label"):
    latents.build(dir=str(folder))
