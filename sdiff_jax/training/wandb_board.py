"""Metrics and sample images on Weights & Biases, beside metrics.jsonl."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdiff_jax.types import Json


class WandbBoard:
  """A run on Weights & Biases; its own environment variables choose user and mode.

  WANDB_MODE=offline writes into the work directory alone, from which `wandb sync` uploads.
  """

  def __init__(self, project: str, workdir: str, config: Mapping[str, Json]):
    """Starts the run, or continues that of the same work directory.

    Args:
      project: name of the project.
      workdir: of the run.
      config: its fields.
    """
    import wandb  # slow to import, and an extra

    self._wandb: Any = wandb
    identity = hashlib.sha256(os.fsencode(workdir)).hexdigest()[:16]
    self._run: Any = wandb.init(
      project=project,
      id=identity,
      name=os.path.basename(workdir),
      config=dict(config),
      dir=workdir if os.path.isdir(workdir) else None,  # not in a bucket
      resume="allow",
    )

  def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
    """Adds the numbers of a step."""
    self._run.log(dict(numbers), step=step)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Adds an image uint8 [H, W, C]."""
    self._run.log({name: self._wandb.Image(image)}, step=step)

  def close(self) -> None:
    """Uploads what is left."""
    self._run.finish()
