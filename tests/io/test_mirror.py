"""Files that grow, in a bucket."""

import pathlib
import time

import pytest

from sdiff_jax.io import file_io, mirror, storage
from sdiff_jax.types import UserError


def until(condition) -> None:
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_lines_are_seen_before_the_file_is_closed(bucket, tmp_path, monkeypatch):
  monkeypatch.setattr(mirror, "SECONDS", 0.05)
  folder = f"{bucket}/{tmp_path.name}"
  path = f"{folder}/a/lines.txt"
  with mirror.mirrored(folder) as (local, _):
    assert not storage.remote(local)
    file = pathlib.Path(local, "a/lines.txt")
    file.parent.mkdir()
    for k in range(3):
      with file.open("a") as lines:
        lines.write(f"{k}\n")
      until(lambda: storage.exists(path))
      until(lambda k=k: file_io.read_text(path).endswith(f"{k}\n"))
  assert file_io.read_text(path) == "0\n1\n2\n"


def test_nobody_waits_for_an_upload(bucket, tmp_path, monkeypatch):
  upload = storage.upload
  monkeypatch.setattr(storage, "upload", lambda *a: (time.sleep(1), upload(*a)))
  folder = f"{bucket}/{tmp_path.name}"
  with mirror.mirrored(folder) as (local, flush):
    pathlib.Path(local, "a.txt").write_text("1")
    start = time.monotonic()
    flush()
    assert time.monotonic() - start < 0.5
  assert file_io.read_text(f"{folder}/a.txt") == "1"


def test_an_upload_that_fails_is_repeated(bucket, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(mirror, "SECONDS", 0.05)
  upload, failures = storage.upload, []

  def fail_once(source: str, path: str) -> None:
    if not failures:
      failures.append(path)
      raise ConnectionError("no network")
    upload(source, path)

  monkeypatch.setattr(storage, "upload", fail_once)
  folder = f"{bucket}/{tmp_path.name}"
  with mirror.mirrored(folder) as (local, _):
    pathlib.Path(local, "a.txt").write_text("1")
    until(lambda: storage.exists(f"{folder}/a.txt"))
  assert f"{folder}: not uploaded: no network" in capsys.readouterr().err


def test_what_is_left_is_uploaded_after_an_error(bucket, tmp_path):
  folder = f"{bucket}/{tmp_path.name}"

  def work() -> None:
    with mirror.mirrored(folder) as (local, _):
      pathlib.Path(local, "a.txt").write_text("1")
      raise UserError("a mistake")

  with pytest.raises(UserError, match="a mistake"):
    work()
  assert file_io.read_text(f"{folder}/a.txt") == "1"


def test_a_folder_of_this_machine_is_used_itself(tmp_path):
  with mirror.mirrored(str(tmp_path)) as (local, flush):
    assert local == str(tmp_path)
    flush()
