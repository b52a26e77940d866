"""Atomic writes, JSON with clear errors, output in parts."""

import json
import os

import full_disk
import numpy as np
import pytest

from sdiff_jax.data.episodes import normalizer
from sdiff_jax.io import file_io, image_io, records, resumable
from sdiff_jax.metrics import frechet
from sdiff_jax.metrics.statistics import reference_statistics
from sdiff_jax.types import UserError


def test_a_failed_write_leaves_the_previous_file(tmp_path):
  path = tmp_path / "new" / "file"
  file_io.write_text(path, "first")

  def fail(temporary):
    with open(temporary, "w") as file:
      file.write("half")
    raise RuntimeError

  with pytest.raises(RuntimeError), file_io.atomic(path) as temporary:
    fail(temporary)
  assert path.read_text() == "first"


def test_text_json_and_arrays_are_read_back(tmp_path):
  file_io.write_bytes(tmp_path / "bytes", b"\0\r\n")
  assert (tmp_path / "bytes").read_bytes() == b"\0\r\n"
  file_io.write_json(tmp_path / "a.json", {"a": (1, "é")})
  assert records.read_json(tmp_path / "a.json") == {"a": [1, "é"]}
  file_io.write_npz(tmp_path / "a.npz", x=np.arange(3))
  with np.load(tmp_path / "a.npz") as arrays:
    np.testing.assert_array_equal(arrays["x"], [0, 1, 2])
  assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_a_bad_json_file_is_named_with_the_remedy(tmp_path, content):
  path = tmp_path / "a.json"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=r"a\.json .*; train again$") as caught:
    records.read_json(path, "train again")
  assert str(caught.value).startswith(str(path))


def test_differences_of_nested_settings():
  stored, current = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}
  assert resumable.differences(stored, current) == [
    "a.c (2 there, 3 now)",
    "d (None there, 4 now)",
  ]


def test_parts_of_other_settings_are_refused(tmp_path):
  output = resumable.Output(str(tmp_path / "parts"), "samples")
  assert output.settings() is None
  output.claim({"steps": 2, "times": (1, 2)})
  output.claim({"steps": 3, "times": (1, 2)})  # no part was made with the first ones
  output.write_part("0.npz", x=np.ones(2))
  output.claim({"steps": 3, "times": (1, 2)})
  with pytest.raises(UserError, match=r"other samples: steps \(3 there, 4 now\);"):
    output.claim({"steps": 4, "times": (1, 2)})
  output.remove()
  output.claim({"steps": 4})
  assert output.settings() == {"steps": 4}


def test_one_process_writes_the_settings(tmp_path):
  output = resumable.Output(str(tmp_path / "parts"), "samples")
  output.claim({"steps": 2}, write=False)
  assert output.settings() is None


def test_a_damaged_part_is_removed(tmp_path, capsys):
  output = resumable.Output(str(tmp_path), "samples")
  output.write_part("0.npz", x=np.zeros(2), y=np.zeros(1))
  output.write_part("1.npz", x=np.ones(2), y=np.zeros(1))
  (tmp_path / "2.npz").write_bytes((tmp_path / "1.npz").read_bytes()[:50])
  output.write_part("3.npz", y=np.zeros(1))
  parts = list(output.read_parts(["x"]))
  assert [float(p["x"][0]) for _, p in parts] == [0, 1]
  assert len(output.parts()) == 2
  assert "2.npz is damaged, making it again" in capsys.readouterr().err


def test_the_settings_file_names_a_damaged_one(tmp_path):
  output = resumable.Output(str(tmp_path), "samples")
  (tmp_path / "settings.json").write_text(json.dumps([1])[:-1])
  with pytest.raises(UserError, match=r"settings\.json is not valid JSON"):
    output.settings()


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
AFFINE = normalizer.Affine(np.ones((9, 64), np.float32), np.ones((9, 64), np.float32))
NORMALIZER = normalizer.Normalizer(AFFINE, AFFINE, 2, (4, 64), 1.0)
WRITERS = {
  "text": lambda path: file_io.write_text(path, "x" * 5000),
  "json": lambda path: file_io.write_json(path, ["x"] * 5000),
  "npz": lambda path: file_io.write_npz(path, a=NOISE),
  "png": lambda path: image_io.save_png(path, NOISE),
  "gif": lambda path: image_io.save_gif(path, [[NOISE, 255 - NOISE]], 10),
  "statistics": lambda path: reference_statistics.save(
    path, {"fid": frechet.Statistics(np.zeros(64), np.eye(64))}
  ),
  "normalizer": lambda path: normalizer.save(path, NORMALIZER),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_on_a_full_disk_the_previous_file_stays_whole(kind, tmp_path):
  path = tmp_path / "file"
  path.write_bytes(b"previous")
  WRITERS[kind](tmp_path / "larger")
  assert (tmp_path / "larger").stat().st_size > 1000
  with pytest.raises(OSError, match="File too large"), full_disk.largest_file(1000):
    WRITERS[kind](path)
  assert path.read_bytes() == b"previous"
  assert {p.name for p in tmp_path.iterdir()} == {"file", "larger"}


def test_a_pipe_in_the_place_of_the_temporary_file_is_replaced(tmp_path):
  os.mkfifo(tmp_path / "a.tmp")
  (tmp_path / "b.tmp").symlink_to(tmp_path / "elsewhere")
  for name in "a", "b":
    file_io.write_text(tmp_path / name, "new")
    assert (tmp_path / name).read_text() == "new"
  assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"window": "x"}', b"\xff"])
def test_parts_without_readable_settings_are_refused(content, tmp_path):
  output = resumable.Output(str(tmp_path / "parts"), "samples")
  output.claim({"window": 1})
  output.write_part("0.npz", x=np.arange(3))
  path = tmp_path / "parts" / "settings.json"
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  for read in output.settings, lambda: output.claim({"window": 1}):
    with pytest.raises(UserError, match=r"or use another directory$") as caught:
      read()
    assert str(caught.value).startswith(str(path))


def test_long_values_of_other_settings_are_shortened():
  (text,) = resumable.differences({"a": "x" * 10_000}, {"a": [0] * 10_000})
  assert len(text) < 200
