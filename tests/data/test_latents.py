"""Latents in files of records, and what is drawn of their posteriors."""

import json
import os
import pathlib

import numpy as np
import pytest

from sdiff_jax import config as configs
from sdiff_jax.data import _codecs, batches, latents
from sdiff_jax.jobs import features, inspect, train
from sdiff_jax.types import UserError

RNG = np.random.default_rng(0)
MOMENTS = RNG.standard_normal((7, 4, 6, 8)).astype(np.float16)
MOMENTS[..., 4:] = np.abs(MOMENTS[..., 4:])
LABELS = np.array([2, 0, 1, 1, 0, 2, 5])
OPTIONS = {"seed": 3, "batch_size": 5, "sigma_d": 0.5}


def save(folder, moments, labels, shard_size=4, **changed):
  """Writes latents as the job `encode` does."""
  about = {"size": len(moments), "shape": [*moments.shape[1:]], "scale": "scm"}
  about |= {"classes": int(labels.max()) + 1, "shard_size": shard_size} | changed
  (folder / "latents.json").write_text(json.dumps(about))
  for k, path in enumerate(latents.paths(str(folder), about)):
    rows = slice(k * shard_size, (k + 1) * shard_size)
    latents.write(path, moments[rows], {"label": labels[rows]})


@pytest.fixture
def folder(tmp_path):
  save(tmp_path, MOMENTS, LABELS)
  return tmp_path


def test_rows_of_all_files(folder):
  source = latents.build(dir=str(folder))
  assert (source.size, source.shape, source.num_classes) == (7, (4, 6, 4), 6)
  chosen = np.array([6, 3, 4, 0])
  moments, cond = source[chosen]
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
  save(tmp_path, np.broadcast_to(exact, (5, 8, 8, 8)), np.zeros(5, int), scale=scale)
  source = latents.build(dir=str(tmp_path), scale=scale)
  x0 = next(batches(source, **OPTIONS))["x0"]
  assert x0.dtype == np.float32
  np.testing.assert_allclose(x0, 0.5, rtol=1e-3)  # of float16


def test_a_batch_draws_the_posterior(tmp_path):
  shape, rows = (16, 32, 4), np.arange(8)
  mean, std = np.full(shape, 3.0), np.full(shape, 2.0)
  moments = np.broadcast_to(np.concatenate([mean, std], -1), (8, 16, 32, 8))
  moments = moments.astype(np.float32)

  def draw(seed: int, k: int) -> np.ndarray:
    return _codecs.sample_posterior(moments, [(seed, k, 2, row) for row in rows])

  z = draw(0, 0)
  assert z.dtype == np.float32
  assert abs(z.mean() - 3) < 5 * 2 / z.size**0.5
  assert abs(z.std() / 2 - 1) < 5 / (2 * z.size) ** 0.5
  product = (z[0] - 3).ravel() @ (z[1] - 3).ravel() / 4  # rows are independent
  assert abs(product) < 5 * z[0].size ** 0.5
  for other in ((1, 0), (0, 1)):  # seed, batch
    assert (draw(*other) != z).mean() > 0.99


def test_rows_of_a_process_are_those_of_the_whole_batch(folder):
  source = latents.build(dir=str(folder))
  whole = batches(source, **OPTIONS, flip=True)
  part = batches(source, **OPTIONS, flip=True, rows=np.array([1, 4]))
  later = batches(source, **OPTIONS, flip=True, start=2)
  for k in range(3):
    a, b = next(whole), next(part)
    np.testing.assert_array_equal(a["x0"][[1, 4]], b["x0"])
    assert k < 2 or np.array_equal(a["x0"], next(later)["x0"])


def test_what_needs_pixels_is_refused(folder, tmp_path):
  c = configs.base()
  c.data = configs.component("data", "latents", dir=str(folder))
  c.train.sample_every = 10
  for job in (inspect, features, train):
    with pytest.raises(UserError, match="config.data are latents"):
      job.run(c, str(tmp_path / "run"))
  source = latents.build(dir=str(folder))
  with pytest.raises(ValueError, match="data are latents"):
    source.codec.to_images(np.zeros((1, 4, 6, 4), np.float32), 0.5)


def test_images_without_classes(tmp_path):
  save(tmp_path, MOMENTS, np.full(7, -1))
  source = latents.build(dir=str(tmp_path))
  assert source.num_classes == 0
  assert source[np.arange(7)][1] == {}


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"scale": "edm2"}, "scale='scm': the latents in .* are 'edm2', encoded"),
    ({"shape": [4, 6, 6]}, "latents of 3 channels; those of 'scm' have 4"),
    ({"shape": [4, 4, 8]}, "cannot be read"),
    ({"shape": [4, 6]}, r"latents.json: shape is \[4, 6\]: it must be a list"),
    ({"shape": 8}, "latents.json: shape is 8: it must be a list"),
    ({"size": "7"}, "latents.json: size is '7': it must be an integer"),
    ({"size": 8}, "has 7 latents, not 8"),
    ({"size": 2**39}, "claims 137438953472 files of records"),
    ({"size": 2**60}, "latents.json: size is 1152921504606846976: it must be"),
    ({"size": 2**39, "shard_size": 2**39}, "00000-of-00001.array_record is missing"),
    ({"shard_size": 0}, "latents.json: shard_size is 0: it must be an integer >= 1"),
    ({"shape": [2**15, 2**15, 8]}, "bytes of latents in"),
    ({"shape": [4, 6, 0]}, r"latents.json: shape\[2\] is 0: it must be"),
    ({"classes": 2**39}, "classes=549755813888: 7 latents have at most 32768"),
    ({"classes": 5}, "record 6 has the label 5 of 5 classes"),
    ({"classes": -1}, "latents.json: classes is -1: it must be an integer >= 0"),
    ({"classes": True}, "latents.json: classes is true: it must be an integer"),
    ({"size": 9}, "00002-of-00003.array_record is missing|00000-of-00003.array_record"),
  ],
)
def test_a_description_that_does_not_fit_is_refused(folder, changed, message):
  path = folder / "latents.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changed))
  with pytest.raises((UserError, ValueError), match=message) as error:
    latents.build(dir=str(folder))
  assert (error.type is ValueError) == ("scale" in changed)


def test_missing_and_damaged_files_are_named(folder):
  for empty in ("", str(folder / "none")):
    with pytest.raises(ValueError, match=f"dir='{empty}': has no latents.json; name a"):
      latents.build(dir=empty)
  with pytest.raises(ValueError, match="scale='sd': must be one of scm, edm2"):
    latents.build(dir=str(folder), scale="sd")
  path = pathlib.Path(latents.paths(str(folder), {"size": 7, "shard_size": 4})[1])
  path.write_bytes(path.read_bytes()[:-300])
  with pytest.raises(UserError, match="cannot be read: .*; encode it again"):
    latents.build(dir=str(folder))
  path.unlink()
  with pytest.raises(UserError, match="is missing, and 0 more: --job=encode has not"):
    latents.build(dir=str(folder))
  (folder / "latents.json").write_text("{")
  with pytest.raises(
    UserError, match="latents.json is not valid JSON .*; encode the images"
  ):
    latents.build(dir=str(folder))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_records_that_are_no_posterior_are_refused(tmp_path, value):
  moments = MOMENTS.copy()
  moments[3, 0, 0, 7] = value
  save(tmp_path, moments, LABELS)
  source = latents.build(dir=str(tmp_path))
  source[np.array([2, 4])]
  with pytest.raises(UserError, match="cannot be read: record 3 (is not finite|has a)"):
    source[np.array([2, 3])]


def test_a_pipe_in_place_of_records_is_refused(folder):
  path = pathlib.Path(latents.paths(str(folder), {"size": 7, "shard_size": 4})[1])
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(UserError, match="is not a regular file"):
    latents.build(dir=str(folder))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
  path = str(tmp_path / "none" / "x.array_record")
  with pytest.raises(UserError, match="x.array_record was not written: "):
    latents.write(path, MOMENTS, {"label": LABELS})
