"""CLIP's tokenizer, by the package `tokenizers`."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdiff_jax.io import file_io
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Field
from sdiff_jax.types import Json, UserError

Tokenizers = Any  # the package and its objects; it is an optional dependency

# A word is a run of letters, a digit, the end of a contraction, or other characters.
WORDS = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
  r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
DEFAULTS = {"bos": "<|startoftext|>", "eos": "<|endoftext|>"}
Token = str | dict | None  # a text, or a mapping with its text as "content"
FIELDS = {f"{kind}_token": Field(None, Token) for kind in ("bos", "eos", "pad")}
CONFIG = "tokenizer_config.json"
MIN_LENGTH = 3  # tokens: start, one of the text, end


class Tokenizer(NamedTuple):
  """CLIP's byte pair encoding.

  Attributes:
    encode: (texts) -> token ids, int32 [N, length]: start, tokens, end, padding. Texts
      that are too long are truncated.
    length: number of tokens of every text.
    size: of the vocabulary.
    last: largest token id.
    instructed: instruction -> a tokenizer that sets it before every text; None if the
      network takes none.
  """

  encode: Callable[[Sequence[str]], np.ndarray]
  length: int
  size: int
  last: int
  instructed: "Callable[[str], Tokenizer] | None" = None


def load(folder: str, length: int = 77) -> Tokenizer:
  """Returns the tokenizer of a folder.

  As in transformers, a text that contains the padding token ("!" for Stable Diffusion 2)
  gets its id.

  Args:
    folder: with tokenizer.json, or vocab.json and merges.txt; and with
      tokenizer_config.json if padding is not by the end token.
    length: largest number of tokens of a text.

  Raises:
    UserError: the package is not installed, or files are missing or damaged.
  """
  try:
    import tokenizers
  except ImportError:
    raise UserError(
      "text needs the package tokenizers: pip install 'sdiff_jax[diffusers]'"
    ) from None
  config = fields(folder, "special_tokens_map.json")
  config |= fields(folder, CONFIG)
  names = {k: config.get(f"{k}_token", v) for k, v in DEFAULTS.items()}
  names["pad"] = config.get("pad_token", names["eos"])
  try:
    tokenizer = _read(tokenizers, folder, names)
  except UserError:
    raise
  except Exception as error:  # the package raises bare exceptions
    reason = config_fields.quoted(f"{type(error).__name__}: {error}", str, 200)
    raise UserError(f"{folder} holds no tokenizer of CLIP ({reason})") from error
  ids = {k: tokenizer.token_to_id(v) for k, v in names.items()}
  length = min(length, config.get("model_max_length", length))
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length, pad_id=ids["pad"], pad_token=names["pad"])

  def encode(texts: Sequence[str]) -> np.ndarray:
    return np.array([e.ids for e in tokenizer.encode_batch([*texts])], np.int32)

  last = max(tokenizer.get_vocab().values())
  return Tokenizer(encode, length, tokenizer.get_vocab_size(), last)


def fields(folder: str, name: str = CONFIG) -> dict[str, Json]:
  """Returns the special tokens and the length in a JSON file, {} if it does not exist.

  Args:
    folder: of the tokenizer.
    name: of the file.

  Raises:
    UserError: the file is damaged, or a field has another type or is out of range.
  """
  path = os.path.join(folder, name)
  if not os.path.exists(path):
    return {}
  config = config_fields.read_config(path)
  try:
    found = config_fields.validated_config(
      {name: config[name] for name in FIELDS if name in config}, FIELDS, {}
    )
    tokens = {
      name: _text(name, token) for name, token in found.items() if token is not None
    }
    if "model_max_length" in config:  # 10^30 for no limit, more than msgspec reads
      length = config["model_max_length"]
      if type(length) is not int or length < MIN_LENGTH:
        raise ValueError(
          f"model_max_length={config_fields.quoted(length)}: must be an integer of at "
          f"least {MIN_LENGTH}"
        )
      tokens["model_max_length"] = length
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
  return tokens


def _text(name: str, token: Json) -> str:
  """Returns a token, which may be stored as a dict with its content."""
  text = token.get("content") if isinstance(token, dict) else token
  if not isinstance(text, str) or not text:
    raise ValueError(
      f"{name}={config_fields.quoted(token)}: must be a text, or have a text `content`"
    )
  return text


def _read(tokenizers: Tokenizers, folder: str, names: dict[str, str]) -> Tokenizers:
  path = os.path.join(folder, "tokenizer.json")
  if os.path.exists(path):
    tokenizer = tokenizers.Tokenizer.from_buffer(file_io.read_bytes(path))
  else:
    tokenizer = _byte_pairs(tokenizers, folder, names)
  for kind, name in names.items():
    if tokenizer.token_to_id(name) is None:
      raise ValueError(
        f"{kind}_token={config_fields.quoted(name)}: must be in the vocabulary"
      )
  tokenizer.add_special_tokens([*names.values()])
  return tokenizer


def _byte_pairs(
  tokenizers: Tokenizers, folder: str, names: dict[str, str]
) -> Tokenizers:
  """Returns the tokenizer of vocab.json and merges.txt (arXiv:2103.00020, 2.4)."""
  t = tokenizers
  files = [os.path.join(folder, name) for name in ("vocab.json", "merges.txt")]
  for path in filter(os.path.exists, files):
    file_io.read_bytes(path)  # which refuses what is no file of that size
  model = t.models.BPE.from_file(
    *files, end_of_word_suffix="</w>", unk_token=names["eos"]
  )
  tokenizer = t.Tokenizer(model)
  spaces = t.normalizers.Replace(t.Regex(r"\s+"), " ")
  tokenizer.normalizer = t.normalizers.Sequence(
    [t.normalizers.NFC(), spaces, t.normalizers.Lowercase()]
  )
  words = t.pre_tokenizers.Split(t.Regex(WORDS), behavior="removed", invert=True)
  to_bytes = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.pre_tokenizer = t.pre_tokenizers.Sequence([words, to_bytes])
  start, end = ((names[k], tokenizer.token_to_id(names[k])) for k in ("bos", "eos"))
  if None in (start[1], end[1]):
    raise ValueError(f"vocab.json lacks {start[0]} or {end[0]}")
  tokenizer.post_processor = t.processors.RobertaProcessing(
    end, start, trim_offsets=False, add_prefix_space=False
  )
  return tokenizer
