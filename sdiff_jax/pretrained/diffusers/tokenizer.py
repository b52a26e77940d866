"""Texts to the tokens of CLIP, by the package `tokenizers`."""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdiff_jax.types import UserError

# A word is letters, one digit, the end of a contraction, or other signs.
WORDS = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
  r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
DEFAULTS = {"bos": "<|startoftext|>", "eos": "<|endoftext|>"}


class Tokenizer(NamedTuple):
  """CLIP's byte pair encoding.

  Attributes:
    encode: (texts) -> int32 [N, length]; start, tokens, end, then padding. A text that
      is too long loses its last tokens.
    length: tokens of every text.
    size: ids are below it.
  """

  encode: Callable[[Sequence[str]], np.ndarray]
  length: int
  size: int


def load(folder: str, length: int = 77) -> Tokenizer:
  """Returns the tokenizer of a folder.

  Read from tokenizer.json, or else from vocab.json and merges.txt. As in transformers,
  a text that holds the padding's token ("!" for Stable Diffusion 2) gets its id.

  Args:
    folder: with tokenizer_config.json, too, where padding is not by the end token.
    length: tokens of every text, at most.

  Raises:
    UserError: the package is not installed, or files are missing or damaged.
  """
  try:
    import tokenizers
  except ImportError:
    raise UserError(
      "text needs the package tokenizers: pip install 'sdiff_jax[diffusers]'"
    ) from None
  config = _json(folder, "special_tokens_map.json")
  config |= _json(folder, "tokenizer_config.json")
  names = {k: _text(config.get(f"{k}_token"), v) for k, v in DEFAULTS.items()}
  names["pad"] = _text(config.get("pad_token"), names["eos"])
  try:
    found = _read(tokenizers, folder, names)
  except Exception as error:  # the package has no class of errors of its own
    reason = f"{type(error).__name__}: {error}"
    raise UserError(f"{folder} holds no tokenizer of CLIP ({reason})") from error
  ids = {k: found.token_to_id(v) for k, v in names.items()}
  length = int(min(length, config.get("model_max_length", length)))
  found.enable_truncation(length)
  found.enable_padding(length=length, pad_id=ids["pad"], pad_token=names["pad"])

  def encode(texts: Sequence[str]) -> np.ndarray:
    return np.array([e.ids for e in found.encode_batch([*texts])], np.int32)

  return Tokenizer(encode, length, found.get_vocab_size())


def _json(folder: str, name: str) -> dict[str, Any]:
  """Returns what a file holds; nothing where there is no file."""
  path = os.path.join(folder, name)
  if not os.path.exists(path):
    return {}
  try:
    with open(path, encoding="utf-8") as file:
      return json.load(file)
  except ValueError as error:
    raise UserError(f"{path} is damaged: {error}") from None


def _text(token: Any, default: str) -> str:
  """Returns a token that may be written as a dict with its content."""
  return (token["content"] if isinstance(token, dict) else token) or default


def _read(tokenizers: Any, folder: str, names: dict[str, str]) -> Any:
  path = os.path.join(folder, "tokenizer.json")
  if os.path.exists(path):
    found = tokenizers.Tokenizer.from_file(path)
  else:
    found = _byte_pairs(tokenizers, folder, names)
  found.add_special_tokens([*names.values()])
  return found


def _byte_pairs(tokenizers: Any, folder: str, names: dict[str, str]) -> Any:
  """Returns the tokenizer of vocab.json and merges.txt (arXiv:2103.00020, 2.4)."""
  t = tokenizers
  files = (os.path.join(folder, name) for name in ("vocab.json", "merges.txt"))
  model = t.models.BPE.from_file(
    *files, end_of_word_suffix="</w>", unk_token=names["eos"]
  )
  found = t.Tokenizer(model)
  spaces = t.normalizers.Replace(t.Regex(r"\s+"), " ")
  found.normalizer = t.normalizers.Sequence(
    [t.normalizers.NFC(), spaces, t.normalizers.Lowercase()]
  )
  words = t.pre_tokenizers.Split(t.Regex(WORDS), behavior="removed", invert=True)
  to_bytes = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
  found.pre_tokenizer = t.pre_tokenizers.Sequence([words, to_bytes])
  start, end = ((names[k], found.token_to_id(names[k])) for k in ("bos", "eos"))
  if None in (start[1], end[1]):
    raise ValueError(f"vocab.json lacks {start[0]} or {end[0]}")
  found.post_processor = t.processors.RobertaProcessing(
    end, start, trim_offsets=False, add_prefix_space=False
  )
  return found
