"""The tokenizers of T5 and Gemma, by the package `tokenizers`."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdiff_jax.io import file_io
from sdiff_jax.pretrained.diffusers import tokenizer as tokenizer_lib
from sdiff_jax.pretrained.diffusers.tokenizer import Tokenizer
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.types import UserError

PADDING = "<pad>"
# First and last token of an instruction and its text, which SANA does not count twice.
SHARED = 2


def load(folder: str, length: int, *, lower: bool = False) -> Tokenizer:
  """Returns the tokenizer of a folder.

  Args:
    folder: with tokenizer.json.
    length: number of tokens of every text: longer ones are cut, others padded.
    lower: whether texts are in lower case, without spaces around them, and may have an
      instruction. Their padding is not attended to, so the smaller `model_max_length` of
      tokenizer_config.json changes long texts only.

  Raises:
    UserError: the package is not installed, or the file is missing or damaged.
  """
  try:
    import tokenizers
  except ImportError:
    raise UserError(
      "text needs the package tokenizers: pip install 'sdiff_jax[diffusers]'"
    ) from None
  if lower:
    length = min(length, tokenizer_lib.fields(folder).get("model_max_length", length))
  path = os.path.join(folder, "tokenizer.json")
  if not os.path.exists(path):
    raise UserError(
      f"{path} does not exist: the tokenizers of T5 and Gemma are read from it; "
      "transformers writes it by AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )
  try:
    tokenizer = tokenizers.Tokenizer.from_buffer(file_io.read_bytes(path))
    if tokenizer.token_to_id(PADDING) is None:
      raise ValueError(f"{PADDING}: must be in the vocabulary")
  except UserError:
    raise
  except Exception as error:  # the package raises bare exceptions
    reason = config_fields.quoted(f"{type(error).__name__}: {error}", str, 200)
    raise UserError(f"{folder} holds no tokenizer of T5 or Gemma ({reason})") from error

  def instructed(instruction: str) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    count = len(tokenizer.encode(instruction).ids)
    return _fixed(tokenizer, length + count - SHARED, instruction, lower)

  found = _fixed(tokenizer, length, "", lower)
  return found._replace(instructed=instructed) if lower else found


def _fixed(tokenizer: Any, length: int, instruction: str, lower: bool) -> Tokenizer:
  """Returns the tokenizer of texts of some length behind an instruction."""
  padding = tokenizer.token_to_id(PADDING)

  def encode(texts: Sequence[str]) -> np.ndarray:
    texts = [text.lower().strip() if lower else text for text in texts]
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=padding, pad_token=PADDING)
    rows = tokenizer.encode_batch([instruction + text for text in texts])
    return np.array([e.ids for e in rows], np.int32)

  last = max(tokenizer.get_vocab().values())
  return Tokenizer(encode, length, tokenizer.get_vocab_size(), last)
