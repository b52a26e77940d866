"""Texts that are written out, and COCO's captions."""

import json

import pytest

from sdiff_jax.pretrained.diffusers import prompts
from sdiff_jax.types import UserError


def test_texts_with_semicolons():
  assert prompts.read("a cat; a dog;") == ["a cat", "a dog"]
  assert prompts.read("ein Bär, zwei") == ["ein Bär, zwei"]


def test_captions_in_the_order_of_the_file(tmp_path):
  rows = [{"id": 9, "caption": "A cat. \n"}, {"id": 3, "caption": "Ein Bär"}]
  path = tmp_path / "captions.json"
  path.write_text(json.dumps({"images": [], "annotations": rows}))
  assert prompts.read(str(path)) == ["A cat.", "Ein Bär"]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "captions.json is not valid JSON "),
    ("\xff", "captions.json is not valid JSON "),
    ("[]", "captions.json has no captions: it must have a list `annotations`"),
    ('{"annotations": []}', "has no captions"),
    ('{"annotations": {"caption": "a"}}', "has no captions"),
    ('{"annotations": [{"caption": "a"}, {"id": 1}]}', r"annotations\[1\] has no text"),
    ('{"annotations": ["a"]}', r"annotations\[0\] has no text `caption`"),
    ('{"annotations": [{"caption": " "}]}', r"annotations\[0\] has no text"),
  ],
)
def test_files_of_another_form_are_refused(tmp_path, text, message):
  path = tmp_path / "captions.json"
  path.write_bytes(text.encode("latin-1"))
  with pytest.raises(UserError, match=message):
    prompts.read(str(path))


def test_no_file_and_no_text():
  with pytest.raises(UserError, match="no.json does not exist"):
    prompts.read("no.json")
  for empty in ("", " ; "):
    with pytest.raises(ValueError, match="prompts=.*: must have texts"):
      prompts.read(empty)
