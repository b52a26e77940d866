"""Which images of a folder are read: nested ones, EDM's index, chunks, what is left out."""

import json
import os

import numpy as np
import pytest
from image_folders import noise, save

from sdiff_jax.data import folder
from sdiff_jax.types import UserError


def test_images_of_a_class_may_lie_in_further_folders(tmp_path, capsys):
  names = ["a/x/1.png", "a/x/y/2.png", "a/0.png", "b/3.png"]
  arrays = [noise(8, 8) for _ in names]
  for name, array in zip(names, arrays, strict=True):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    save(tmp_path / name, array)
  (tmp_path / "a" / "x" / "up").symlink_to(tmp_path)  # a circle
  source = folder.build(dir=str(tmp_path), image_size=8)
  images, cond = source[np.arange(source.size)]
  np.testing.assert_array_equal(images, [arrays[k] for k in (2, 0, 1, 3)])
  assert cond["label"].tolist() == [0, 0, 0, 1]
  assert "1 entries are not read: a/x/up" in capsys.readouterr().err


def edm(folder, labels, chunk: int = 6, index: bool = True) -> list[np.ndarray]:
  """Writes images as EDM's dataset_tool.py does; labels is a list or None."""
  arrays = [noise(8, 8) for _ in range(12)]
  names = [f"{k // chunk:05d}/img{k:08d}.png" for k in range(12)]
  for name, array in zip(names, arrays, strict=True):
    save(folder / name, array)
  pairs = labels and list(zip(names, labels, strict=True))[::-1]
  if index:
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
  return arrays


def test_classes_of_edm_are_those_of_its_index(tmp_path, capsys):
  labels = [3, 0, 0, 1, 2, 3, 3, 2, 1, 0, 1, 2]
  arrays = edm(tmp_path, labels)
  source = folder.build(dir=str(tmp_path), image_size=8)
  assert (source.size, source.num_classes) == (12, 4)
  images, cond = source[np.arange(12)]
  np.testing.assert_array_equal(images, arrays)
  assert cond["label"].tolist() == labels
  assert capsys.readouterr().err == ""


def test_images_of_edm_without_labels_are_one_class(tmp_path):
  edm(tmp_path, None)
  source = folder.build(dir=str(tmp_path), image_size=8)
  assert (source.size, source.num_classes) == (12, 1)


def test_an_index_that_does_not_fit_is_refused(tmp_path):
  edm(tmp_path, [0] * 12)
  index = tmp_path / "dataset.json"

  def refuses(content: bytes | str, match: str) -> None:
    index.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=match) as error:
      folder.build(dir=str(tmp_path), image_size=8)
    assert str(error.value).startswith(str(index))
    assert len(str(error.value)) < 500

  def pairs(label) -> str:
    names = [f"{k // 6:05d}/img{k:08d}.png" for k in range(12)]
    return json.dumps({"labels": [[name, label] for name in names]})

  refuses(
    json.dumps({"labels": [["00000/img00000000.png", 0]]}), "has no label of .* 10"
  )
  refuses(pairs(-1), "a label is -1")
  refuses(pairs(2**40), "a label is 1099511627776; 12 samples may have labels up to")
  refuses(pairs(10**30), "labels must be integers")
  refuses(pairs([0.0, 1.0]), "labels must be integers")
  refuses(pairs(True), "labels must be integers")
  refuses(pairs(None), "labels must be integers")
  twice = json.loads(pairs(0))["labels"] * 2
  refuses(json.dumps({"labels": twice}), "lists a file twice")
  refuses("x" * 10_000, "is damaged")
  refuses("[" * 100_000, "is damaged")
  refuses(b"\xff\xfe", "is damaged")
  refuses('{"labels": 3}', "is damaged")
  refuses("[]", "is damaged")


def test_chunks_without_their_index_are_refused(tmp_path):
  edm(tmp_path, None, index=False)
  with pytest.raises(ValueError, match=r"00000 to 00001 are chunks.*dataset\.json"):
    folder.build(dir=str(tmp_path), image_size=8)
  (tmp_path / "00001" / "img00000011.png").unlink()  # the last chunk may be smaller
  with pytest.raises(ValueError, match="are chunks"):
    folder.build(dir=str(tmp_path), image_size=8)
  (tmp_path / "00001").rename(tmp_path / "dog")
  assert folder.build(dir=str(tmp_path), image_size=8).num_classes == 2


def test_numbers_are_names_of_classes_too(tmp_path):
  for digit in range(3):
    for k in range(2):
      save(tmp_path / f"{digit}" / f"{k}.png", noise(8, 8))
  assert folder.build(dir=str(tmp_path), image_size=8).num_classes == 3


def test_files_that_are_not_read_are_counted_and_named(tmp_path, capsys):
  save(tmp_path / "a" / "1.png", noise(8, 8))
  save(tmp_path / "a" / ".hidden.png", noise(8, 8))
  save(tmp_path / "a" / "2.bmp", noise(8, 8))
  save(tmp_path / ".thumbnails" / "1.png", noise(8, 8))
  (tmp_path / "notes.txt").write_text("notes")
  source = folder.build(dir=str(tmp_path), image_size=8)
  assert (source.size, source.num_classes) == (1, 1)
  line = capsys.readouterr().err
  assert f"{tmp_path}: 4 entries are not read: .thumbnails, a/.hidden.png" in line
  assert "and 1 more" in line


def test_the_digest_changes_with_any_file(tmp_path):
  edm(tmp_path, [0] * 12)

  def digest() -> bytes:
    return folder.build(dir=str(tmp_path), image_size=8).digest()

  first = digest()
  assert digest() == first
  path = tmp_path / "00001" / "img00000011.png"
  save(path, noise(8, 8))
  os.utime(path, ns=(0, 1))
  assert digest() != first
