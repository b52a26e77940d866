"""What a format of the job `export` gets and returns."""

from collections.abc import Mapping
from typing import NamedTuple

import ml_collections

from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.types import Params


class Run(NamedTuple):
  """A trained run.

  Attributes:
    config: gives sampler and sample.
    stored: the config that it was trained with.
    experiment: its pieces, on one device.
    params: its averaged parameters.
  """

  config: ml_collections.ConfigDict
  stored: ml_collections.ConfigDict
  experiment: Experiment
  params: Params

  @property
  def merged(self) -> Params:
    """The parameters without adapters (LoRA), which are merged into the weights."""
    return experiments.merged(self.stored, self.params)


class Written(NamedTuple):
  """What a format wrote.

  Attributes:
    about: the kind of files in a few words, for the last line of the job.
    usage: paragraphs of the card that say how the files are used, Markdown.
    fields: of the card's header, such as {"library_name": "diffusers"}.
  """

  about: str
  usage: str
  fields: Mapping[str, str] = {}
