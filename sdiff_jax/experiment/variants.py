"""Variants of a config file, the words behind its name: configs/imagenet512_scd.py:S,tiny."""

import os
from collections.abc import Iterable

import ml_collections

from sdiff_jax import config, registry

# The word for seconds of work on the digits, see `make_tiny`.
TINY_WORD = ("", "tiny")


def parse(variant: str, *groups: Iterable[str]) -> tuple[str, ...]:
  """Returns one word of every group, for the words of a variant.

  Args:
    variant: words in any order, separated by commas; "" for none.
    *groups: alternatives, such as sizes; the first one is used if none is named. A
      group that starts with "" is optional.

  Raises:
    ValueError: a word that is in no group, or two of one group.

  Example:
    >>> parse("tiny", ("S", "M"), ("", "tiny"))
    ('S', 'tiny')
  """
  groups = tuple(tuple(group) for group in groups)
  words = [word for word in variant.split(",") if word]
  choices = [[word for word in words if word in group] for group in groups]
  if sum(map(len, choices)) != len(words) or any(len(c) > 1 for c in choices):
    names = [[repr(w) for w in group if w] for group in groups]
    if sum(map(len, names)) == 1:
      raise ValueError(f"the only variant is {''.join(*names)}")
    known = [f"one of {', '.join(g)}" if len(g) > 1 else g[0] for g in names]
    raise ValueError(f"variants are {', and '.join(known)}")
  return tuple((*c, *group)[0] for c, group in zip(choices, groups, strict=True))


def workdir(file: str) -> str:
  """Returns runs/X_words of configs/X.py:words, the default work directory."""
  name, _, words = os.path.basename(file).partition(".py")
  words = words.removeprefix(":").split(",")
  return os.path.join("runs", "_".join([name, *filter(None, words)]))


def distill(c: ml_collections.ConfigDict, file: str, variant: str = "") -> None:
  """Makes the run of a config file, in the same variant, teacher and initial weights."""
  c.teacher.config = f"{file}:{variant}" if variant else file
  c.teacher.workdir = workdir(c.teacher.config)
  c.init_from = c.teacher.get_oneway_ref("workdir")


def train_on_data(c: ml_collections.ConfigDict) -> None:
  """Turns sCD into sCT: the velocity is that of the data, and there is no teacher.

  The run that was distilled still gives the initial weights.
  """
  file = c.teacher.config
  c.init_from = workdir(file)
  c.teacher.workdir = ""
  c.loss.velocity = "data"


def make_tiny(c: ml_collections.ConfigDict) -> None:
  """Turns a config into seconds of work on the digits, with the same kind of network.

  The network gets the fields that it registers as `tiny`, if any. Precision, loss,
  optimizer, averages and samplers stay those of the experiment.
  """
  c.data = config.component("data", "digits")
  c.rehearse.shape = ()
  c.model.update(registry.lookup("models", c.model.name).facts.get("tiny", {}))
  c.train.update(steps=4, batch_size=16, log_every=2)
  c.optim.rampup_images = min(c.optim.rampup_images, 32)
  c.checkpoint.every = 4
  c.sample.update(num=16, batch_size=16)
  c.evaluate.update(num=100, batch_size=48)
