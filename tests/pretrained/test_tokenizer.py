"""CLIP's tokenizer against transformers' ids."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import FIXTURES

from sdiff_jax.pretrained.diffusers import tokenizer as tokenizer_lib
from sdiff_jax.types import UserError

SD2 = FIXTURES / "tiny-sd2"
EXPECTED = json.loads((SD2 / "tokenizer_expected.json").read_text())
START, END, PAD = 0, 62, 1


@pytest.fixture
def folder(tmp_path):
  """A copy of the tokenizer's folder."""
  return shutil.copytree(SD2 / "tokenizer", tmp_path / "tokenizer")


@pytest.mark.parametrize("removed", [(), ("tokenizer.json",)])
def test_ids(folder, removed):
  """The "!" of a prompt is the padding's token; long prompts keep their end."""
  for name in removed:
    (folder / name).unlink()
  tokenizer = tokenizer_lib.load(str(folder))
  ids = tokenizer.encode(EXPECTED["prompts"])
  np.testing.assert_array_equal(ids, EXPECTED["input_ids"])
  assert (ids.dtype, tokenizer.length, tokenizer.size) == (np.int32, 12, 63)


def test_length(folder):
  ids = tokenizer_lib.load(str(folder), 5).encode(["red dog", "the cat on the red hat"])
  assert ids.shape == (2, 5)
  assert [*ids[0]] == [START, 57, 53, END, PAD]
  assert (ids[1, 0], ids[1, -1]) == (START, END)


def test_tokens_named_by_dicts(folder):
  """As older files write them; padding is by the end where none is named."""
  end = {"content": "<|endoftext|>", "lstrip": False, "__type": "AddedToken"}
  config = {"eos_token": end, "model_max_length": 4}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  (folder / "tokenizer.json").unlink()
  ids = tokenizer_lib.load(str(folder)).encode(["dog"])
  np.testing.assert_array_equal(ids, [[START, 53, END, END]])


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("tokenizer.json", "{", r"tokenizer holds no tokenizer of CLIP \("),
    ("tokenizer_config.json", "[", r"tokenizer_config\.json is not valid JSON"),
    ("vocab.json", '{"a": 0}', r"holds no tokenizer of CLIP \(.*"),
    ("vocab.json", None, r"no tokenizer of CLIP \(.*No such file"),
  ],
)
def test_damaged_files(folder, name, text, message):
  if name == "vocab.json":
    (folder / "tokenizer.json").unlink()
  (folder / name).unlink()
  if text is not None:
    (folder / name).write_text(text)
  with pytest.raises(UserError, match=message):
    tokenizer_lib.load(str(folder))


def test_without_the_package(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(UserError, match=r"pip install 'sdiff_jax\[diffusers\]'"):
    tokenizer_lib.load(str(folder))
