"""Atomic writes, JSON with clear errors, output in parts."""

import json

import numpy as np
import pytest

from sdiff_jax.io import file_io, records, resumable
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
  assert [float(p["x"][0]) for p in parts] == [0, 1]
  assert len(output.parts()) == 2
  assert "2.npz is damaged, making it again" in capsys.readouterr().err


def test_the_settings_file_names_a_damaged_one(tmp_path):
  output = resumable.Output(str(tmp_path), "samples")
  (tmp_path / "settings.json").write_text(json.dumps([1])[:-1])
  with pytest.raises(UserError, match=r"settings\.json is not valid JSON"):
    output.settings()
