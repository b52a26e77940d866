"""Variants of a config file, as in configs/imagenet512_scd.py:S,tiny."""

import os
from collections.abc import Iterable

import ml_collections

from sdiff_jax import config
from sdiff_jax.types import UserError

# Fields of a small network of each kind for the 8 x 8 digits; other fields keep their
# values.
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


def parse_variant(
  variant: str, file: str, sizes: Iterable[str] = ()
) -> tuple[str, bool]:
  """Returns the size that a variant such as "S,tiny" names, and whether it is tiny.

  Args:
    variant: a size and "tiny", in any order and separated by a comma; "" for neither.
    file: config file, for the message.
    sizes: names of the sizes; the first one is the default.

  Raises:
    UserError: an unknown name, or two sizes; the message lists the known names.
  """
  sizes, names = (*sizes,), [name for name in variant.split(",") if name]
  size = [name for name in names if name != "tiny"]
  if len(size) > 1 or not {*size} <= {*sizes}:
    known = f"variants are one of {', '.join(sizes)}, and" if sizes else ""
    raise UserError(f"{file}:{variant}: {known or 'the only variant is'} 'tiny'")
  return (*size, *sizes, "")[0], "tiny" in names


def workdir(file: str) -> str:
  """Returns runs/X_S_tiny for configs/X.py:S,tiny, the run's work directory."""
  name, _, variant = os.path.basename(file).partition(".py")
  names = variant.removeprefix(":").split(",")
  return os.path.join("runs", "_".join([name, *filter(None, names)]))


def teacher(file: str, variant: str) -> dict[str, str]:
  """Returns the section `teacher` for the run of a config file's same variant."""
  file = f"{file}:{variant}" if variant else file
  return {"config": file, "workdir": workdir(file)}


def make_tiny(c: ml_collections.ConfigDict) -> None:
  """Reduces a config to seconds of work on the digits with the same kind of network.

  Everything that does not need size stays: precision, losses, optimizer, averages,
  samplers.
  """
  c.data = config.component("data", "digits")
  c.rehearse.shape = ()
  c.model.update(TINY[c.model.name])
  c.train.update(steps=4, batch_size=16, log_every=2)
  c.optim.rampup_images = min(c.optim.rampup_images, 32)
  c.checkpoint.every = 4
  c.sample.update(num=16, batch_size=16)
  c.evaluate.update(num=100, batch_size=48)
