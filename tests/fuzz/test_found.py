"""Inputs that the fuzz found, one test for each kind."""

import os

import _mutations
import _readers
import pytest

from sdiff_jax import main
from sdiff_jax.types import UserError


def _link_to_itself(path: str) -> None:
  os.remove(path)
  os.symlink(os.path.basename(path), path)


def _folder(path: str) -> None:
  os.remove(path)
  os.mkdir(path)


def _npy_header(shape: str) -> bytes:
  text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}\n".encode()
  return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _text(content: bytes):
  def replace(path: str) -> None:
    with open(path, "wb") as file:
      file.write(content)

  return replace


@pytest.mark.parametrize(
  ("reader", "file", "change", "message"),
  [
    ("episodes logs", "a_task/1.mjl", _link_to_itself, "Too many levels of symbolic"),
    ("episodes logs", "a_task/1.mjl", _folder, "Is a directory; download it again"),
    (
      "data latents",
      "latents-00000-of-00002.array_record",
      _folder,
      "cannot be read: .*; encode it again",
    ),
    (
      "data tfds",
      "tiny/1.0.0/dataset_info.json",
      _link_to_itself,
      "dataset_info.json: Too many levels of symbolic links",
    ),
    (
      "episodes kitchen",
      "actions_seq.npy",
      _text(_npy_header("((((1,")),
      "actions_seq.npy is no .npy, or damaged .*multi-line",
    ),
    ("settings", "settings.json", _text(b"[]"), "must be an object; remove"),
  ],
)
def test_files(tmp_path, reader, file, change, message):
  reader = _readers.READERS[reader]
  _mutations.write(str(tmp_path), reader.files())
  change(str(tmp_path / file))
  with pytest.raises(UserError, match=message):
    reader.call(str(tmp_path))


def test_files_of_arguments_are_refused(capsys):
  """absl would read /dev/zero until memory is full."""
  with pytest.raises(SystemExit):
    main.main(["main", "--flagfile=/dev/zero"])
  assert "--flagfile=/dev/zero: files of arguments" in capsys.readouterr().err


def test_messages_have_no_characters_that_control_a_terminal(capsys):
  with pytest.raises(SystemExit):
    main.main(["main", "--config=configs/\x1b[31m\u202e.py"])
  assert r"configs/\x1b[31m\u202e.py" in capsys.readouterr().err
