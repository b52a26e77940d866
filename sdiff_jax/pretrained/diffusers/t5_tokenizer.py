"""T5's tokenizer, by the package `tokenizers`."""

import os
from collections.abc import Sequence

import numpy as np

from sdiff_jax.io import file_io
from sdiff_jax.pretrained.diffusers.tokenizer import Tokenizer
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.types import UserError

PADDING = "<pad>"


def load(folder: str, length: int) -> Tokenizer:
  """Returns the tokenizer of a folder.

  Args:
    folder: with tokenizer.json.
    length: number of tokens of every text: longer ones are cut, others padded.

  Raises:
    UserError: the package is not installed, or the file is missing or damaged.
  """
  try:
    import tokenizers
  except ImportError:
    raise UserError(
      "text needs the package tokenizers: pip install 'sdiff_jax[diffusers]'"
    ) from None
  path = os.path.join(folder, "tokenizer.json")
  if not os.path.exists(path):
    raise UserError(
      f"{path} does not exist: the tokenizer of T5 is read from it; transformers writes "
      "it by T5TokenizerFast.from_pretrained(DIR).save_pretrained(DIR)"
    )
  try:
    tokenizer = tokenizers.Tokenizer.from_buffer(file_io.read_bytes(path))
    padding = tokenizer.token_to_id(PADDING)
    if padding is None:
      raise ValueError(f"{PADDING}: must be in the vocabulary")
  except UserError:
    raise
  except Exception as error:  # the package raises bare exceptions
    reason = config_fields.quoted(f"{type(error).__name__}: {error}", str, 200)
    raise UserError(f"{folder} holds no tokenizer of T5 ({reason})") from error
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length, pad_id=padding, pad_token=PADDING)

  def encode(texts: Sequence[str]) -> np.ndarray:
    return np.array([e.ids for e in tokenizer.encode_batch([*texts])], np.int32)

  last = max(tokenizer.get_vocab().values())
  return Tokenizer(encode, length, tokenizer.get_vocab_size(), last)
