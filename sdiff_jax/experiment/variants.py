"""The words behind a config file's name, as in configs/imagenet512_scd.py:S,tiny."""

import os
from collections.abc import Iterable

import ml_collections

from sdiff_jax import config
from sdiff_jax.types import UserError

# Fields of a small network of each kind for the 8 x 8 digits; the rest stays.
TINY = {
  "dit": {"patch": 1, "width": 32, "depth": 2, "heads": 2},
  "ddpmpp": {
    "channels": 8,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attn_resolutions": (4,),
  },
  "edm2": {
    "channels": 8,
    "mults": (1, 2),
    "blocks": 1,
    "attn_resolutions": (4,),
    "head_channels": 8,
    "dropout_resolution": 4,
  },
}


def parse_variant(given: str, file: str, sizes: Iterable[str] = ()) -> tuple[str, bool]:
  """Returns the size and whether it is to be tiny, of words such as "S,tiny".

  Args:
    given: the words, in any order, with commas between them; "" for none.
    file: config file, for the message.
    sizes: names of the sizes; the first one is taken where none is given.

  Raises:
    UserError: another word, or two sizes; the message lists what there is.
  """
  sizes, words = (*sizes,), [word for word in given.split(",") if word]
  chosen = [word for word in words if word != "tiny"]
  if len(chosen) > 1 or not {*chosen} <= {*sizes}:
    known = f"words are one of {', '.join(sizes)}, and" if sizes else "the only word is"
    raise UserError(f"{file}:{given}: {known} 'tiny'")
  return (*chosen, *sizes, "")[0], "tiny" in words


def workdir(file: str) -> str:
  """Returns runs/X_words of configs/X.py:words, where its run lives."""
  name, _, words = os.path.basename(file).partition(".py")
  words = words.removeprefix(":").split(",")
  return os.path.join("runs", "_".join([name, *filter(None, words)]))


def teacher(file: str, given: str) -> dict[str, str]:
  """Returns the section `teacher` of the run of a config file with the same words."""
  file = f"{file}:{given}" if given else file
  return {"config": file, "workdir": workdir(file)}


def make_tiny(c: ml_collections.ConfigDict) -> None:
  """Turns a config into seconds of work on the digits, with the same kind of network.

  What is left of the experiment is all that does not need size: precision, losses,
  optimiser, averages, samplers.
  """
  c.data = config.component("data", "digits")
  c.rehearse.shape = ()
  c.model.update(TINY[c.model.name])
  c.train.update(steps=4, batch_size=16, log_every=2)
  c.optim.rampup_images = min(c.optim.rampup_images, 32)
  c.checkpoint.every = 4
  c.sample.update(num=16, batch_size=16)
  c.evaluate.update(num=100, batch_size=48)
