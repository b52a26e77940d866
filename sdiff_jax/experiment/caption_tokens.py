"""Captions that are stored as tokens, encoded when they are read."""

import dataclasses
import functools

import numpy as np

from sdiff_jax.data import Dataset
from sdiff_jax.diffusion import guidance
from sdiff_jax.pretrained.diffusers import text_encoding
from sdiff_jax.types import CondSpec, UserError

TOKENS = "tokens"  # the names of tokens in a data set begin with it
BATCH = 64  # texts that are encoded at once
DTYPE = np.dtype(np.float16)  # of stored texts, whose values these equal


def encoded(dataset: Dataset, folder: str) -> Dataset:
  """Returns the data set with what text encoders make of its tokens, if it has some.

  They run on the devices of each process, in the threads that read the data, so that
  the next batches are encoded while the network is trained.

  Args:
    dataset: any data set.
    folder: config.text_encoder.

  Raises:
    UserError: the data have tokens, and the folder is missing or made other ones.
  """
  names = [name for name in dataset.cond if name.startswith(TOKENS)]
  if not names:
    return dataset
  if not folder:
    raise UserError(
      "config.text_encoder is empty: name the folder whose tokenizers made the tokens "
      "of config.data"
    )
  texts = text_encoding.load(folder, BATCH)
  empty = texts.tokenize([""])
  stored = dataset[np.arange(1)][1]
  same = {*empty} == {*names} and all(
    np.array_equal(empty[k], stored[guidance.empty_name(k)]) for k in names
  )
  if not same:
    raise UserError(
      f"config.text_encoder={folder}: its tokenizers are not those of config.data"
    )
  empty_values = functools.cache(lambda: _halves(texts.encode(empty)))

  def read(indices: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    values, cond = dataset[indices]
    found = _halves(texts.encode({name: cond[name] for name in names}))
    for name, x in empty_values().items():
      found[guidance.empty_name(name)] = np.broadcast_to(x, found[name].shape)
    return values, found

  specs = {name: CondSpec(shape, DTYPE) for name, shape in texts.shapes.items()}
  specs |= {guidance.empty_name(name): spec for name, spec in specs.items()}
  return dataclasses.replace(dataset, read=read, cond=specs)


def _halves(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns conditions in the type of stored texts.

  Raises:
    UserError: one is not finite, as those of tokens beyond the vocabulary.
  """
  halves = {name: x.astype(DTYPE) for name, x in values.items()}
  if not all(np.isfinite(x).all() for x in halves.values()):
    raise UserError(
      "config.data: the text encoder returned values that float16 does not hold"
    )
  return halves
