"""The text-to-image model that the benchmark trains is one that our readers take."""

import pathlib
import sys

import pytest

from sdiff_jax.pretrained.diffusers import loading, tokenizer

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks" / "fashion_text"


@pytest.fixture
def model(monkeypatch):
  monkeypatch.syspath_prepend(str(FOLDER))
  import model

  yield model
  del sys.modules["model"]


@pytest.mark.slow
def test_the_model_is_a_folder_whose_words_are_tokens(model, tmp_path):
  model.write_model(tmp_path / "start")
  text = tokenizer.load(str(tmp_path / "start" / "tokenizer"))
  words = ["a", "photo", "of", "a", "pair", "of", "trousers"]
  assert len({*text.encode([" ".join(words)])[0].tolist()}) == len({*words}) + 2
  for prompt in (form.format(name) for form in model.FORMS for name in model.NAMES):
    ids = text.encode([prompt])[0].tolist()
    count = len(prompt.replace("-", " - ").split())
    assert len(ids) == model.TOKENS
    assert ids.index(ids[-1]) == 1 + count  # start, one token a word, end
  read = loading.load(str(tmp_path / "start"))
  assert read.unet.shape == (28, 28, 1)
  assert read.vae is None
