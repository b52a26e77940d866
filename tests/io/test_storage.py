"""Paths of this machine and of a bucket: the same calls, the same answers."""

import base64
import os
import pathlib
import sys
import types

import numpy as np
import pytest

from sdiff_jax.io import (
  array_io,
  downloads,
  file_io,
  image_io,
  resumable,
  snapshot,
  storage,
)
from sdiff_jax.types import UserError


@pytest.fixture(params=["here", "bucket"])
def folder(request, tmp_path) -> str:
  """A folder, on this machine and in a bucket."""
  if request.param == "here":
    return str(tmp_path)
  return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def test_files_and_folders(folder):
  assert not storage.exists(f"{folder}/a")
  file_io.write_json(f"{folder}/a/b.json", {"x": 1})
  file_io.write_text(f"{folder}/a/c/d.txt", "é")
  assert sorted(storage.listdir(f"{folder}/a")) == ["b.json", "c"]
  assert storage.glob(f"{folder}/a", "*.json") == [f"{folder}/a/b.json"]
  for exists in (storage.exists, storage.lexists):
    assert [exists(f"{folder}/a{n}") for n in ("", "/b.json", "/b")] == [1, 1, 0]
  assert [storage.isdir(f"{folder}/a{n}") for n in ("", "/b.json", "/b")] == [1, 0, 0]
  assert [storage.isfile(f"{folder}/a{n}") for n in ("", "/b.json", "/b")] == [0, 1, 0]
  assert file_io.read_text(f"{folder}/a/c/d.txt") == "é"
  assert storage.size(f"{folder}/a/c/d.txt") == 2
  with pytest.raises(UserError, match="^.*/a/b does not exist$"):
    file_io.read_bytes(f"{folder}/a/b")
  with pytest.raises(UserError, match="has 2 bytes: at most 1 are read"):
    file_io.read_bytes(f"{folder}/a/c/d.txt", max_bytes=1)
  with pytest.raises(FileNotFoundError):
    storage.listdir(f"{folder}/b")
  storage.remove(f"{folder}/a/b.json")
  with pytest.raises(FileNotFoundError):
    storage.remove(f"{folder}/a/b.json")
  storage.rmtree(f"{folder}/a")
  assert not storage.exists(f"{folder}/a")


def test_a_file_that_was_written_again_has_another_version(folder):
  path = f"{folder}/a.txt"
  file_io.write_text(path, "one")
  first, time = storage.version(path), storage.modified(path)
  assert storage.version(path) == first
  file_io.write_text(path, "two")
  assert storage.version(path) != first
  assert storage.modified(path) >= time > 1.7e9


def test_the_oldest_folder_comes_first(folder):
  for name in ("b", "a"):
    file_io.write_text(f"{folder}/{name}/config.json", "{}")
  times = [storage.created(f"{folder}/{name}") for name in ("b", "a")]
  assert times[0] <= times[1]


def test_a_write_that_fails_leaves_the_old_file(folder):
  path = f"{folder}/a.txt"
  file_io.write_text(path, "old")

  def write() -> None:
    with file_io.atomic(path) as temporary:
      pathlib.Path(temporary).write_text("new")
      raise UserError("a mistake")

  with pytest.raises(UserError, match="a mistake"):
    write()
  assert file_io.read_text(path) == "old"
  assert storage.listdir(folder) == ["a.txt"]


def test_arrays_and_images(folder):
  x = np.arange(6.0).reshape(2, 3)
  file_io.write_npz(f"{folder}/x.npz", x=x)
  np.testing.assert_array_equal(array_io.read_npz(f"{folder}/x.npz")["x"], x)
  assert array_io.npz_headers(f"{folder}/x.npz")["x"].shape == (2, 3)
  image_io.save_png(f"{folder}/x.png", np.zeros((4, 4, 3), np.uint8), "of zeros")
  assert image_io.about(f"{folder}/x.png") == "of zeros"


def test_parts_and_snapshots(folder):
  output = resumable.Output(f"{folder}/parts", "things")
  assert output.settings() is None
  output.claim({"a": 1})
  output.write_part("0.npz", x=np.ones(2))
  file_io.write_text(f"{folder}/parts/1.npz", "no archive")
  found = {path: part["x"].sum() for path, part in output.read_parts(["x"])}
  assert found == {f"{folder}/parts/0.npz": 2}
  assert output.parts() == [f"{folder}/parts/0.npz"]  # the damaged one is gone
  with pytest.raises(UserError, match="other things: a .1 there, 2 now."):
    output.claim({"a": 2})
  output.remove()
  assert not storage.exists(f"{folder}/parts")
  state = snapshot.Snapshot(f"{folder}/s.npz", {"a": 1})
  state.save(lambda: {"x": np.ones(3)}, now=True)
  assert snapshot.Snapshot(f"{folder}/s.npz", {"a": 2}).arrays == {}
  again = snapshot.Snapshot(f"{folder}/s.npz", {"a": 1})
  np.testing.assert_array_equal(again.arrays["x"], np.ones(3))
  again.remove()
  assert not storage.exists(f"{folder}/s.npz")


def test_a_copy_of_a_folder_is_made_once(bucket, tmp_path, monkeypatch):
  monkeypatch.setattr(downloads, "FOLDER", str(tmp_path / "copies"))
  folder = f"{bucket}/{tmp_path.name}/model"
  file_io.write_text(f"{folder}/unet/config.json", "{}")
  copy = downloads.local(f"{folder}/")
  assert os.path.basename(copy) == "model"
  assert pathlib.Path(copy, "unet/config.json").read_text() == "{}"
  monkeypatch.setattr(storage.filesystem(), "get_file", None)
  assert downloads.local(folder) == copy
  monkeypatch.undo()
  file_io.write_text(f"{folder}/unet/config.json", '{"a": 1}')
  other = downloads.local(folder)
  assert pathlib.Path(other, "unet/config.json").read_text() == '{"a": 1}'
  with pytest.raises(UserError, match="/nothing does not exist"):
    downloads.local(f"{bucket}/nothing")
  assert downloads.local("runs/a") == "runs/a"


def test_a_copy_that_does_not_fit_is_refused(bucket, tmp_path, monkeypatch):
  monkeypatch.setattr(downloads, "FOLDER", str(tmp_path / "copies"))
  full = types.SimpleNamespace(free=1000)
  monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: full)
  path = f"{bucket}/{tmp_path.name}/a.tar"
  file_io.write_bytes(path, bytes(200_000))
  with pytest.raises(
    UserError, match=f"^{path}: a copy needs 0.2 MB, and .* 0.0 MB; f"
  ):
    downloads.local(path)
  assert not os.listdir(tmp_path / "copies")


def test_names_that_lead_out_of_a_copy_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(downloads, "FOLDER", str(tmp_path / "copies"))
  there = {"a/b": {"size": 1}, "../../c": {"size": 1}}
  monkeypatch.setattr(storage, "objects", lambda path: there)
  with pytest.raises(UserError, match="^gs://b/x: the name ../../c leads out of it$"):
    downloads.local("gs://b/x")


def test_checksums_are_those_of_the_content(bucket, tmp_path):
  folder = f"{bucket}/{tmp_path.name}"
  file_io.write_bytes(f"{folder}/a/b", b"123456789")
  assert storage.checksums(folder) == {"a/b": 0xE3069283}  # the check value of CRC-32C
  assert base64.b64encode(bytes.fromhex("e3069283")) == b"4waSgw=="


def test_a_bucket_that_does_not_exist_is_one_line(bucket):
  storage.check_access(f"{bucket}/run")
  with pytest.raises(UserError, match="^gs://none/run: gs://none cannot be used "):
    storage.check_access("gs://none/run")


def test_without_the_package_there_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  storage.filesystem.cache_clear()
  with pytest.raises(UserError, match=r"pip install 'sdiff_jax\[gcs\]'"):
    storage.exists("gs://test/run")


@pytest.mark.parametrize(
  ("path", "problem"),
  [
    ("runs/a", ""),
    ("/a:b/c", ""),
    ("gs://bucket/run", ""),
    ("gs:/bucket/run", "a path of this machine, or start with gs://"),
    ("s3://bucket/run", "a path of this machine, or start with gs://"),
    ("file:///run", "a path of this machine, or start with gs://"),
    ("hf://a/b", "a path of this machine, or start with gs://"),
  ],
)
def test_other_urls_are_refused(path, problem):
  assert storage.problem(path) == problem


def test_absolute():
  assert storage.absolute("gs://bucket//a/b//") == "gs://bucket/a/b"
  assert storage.absolute("a") == os.path.abspath("a")
