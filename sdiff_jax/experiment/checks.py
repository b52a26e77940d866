"""Checks of a training run before any work starts."""

import importlib.util

import ml_collections

from sdiff_jax.data import Dataset
from sdiff_jax.diffusion import guidance
from sdiff_jax.types import UserError


def check_conditions(config: ml_collections.ConfigDict, dataset: Dataset) -> None:
  """Checks the fields of guidance and of flips against the data and the network.

  Raises:
    UserError: a field needs images or labels that the data do not have, or a network
      that takes scales of guidance.
  """
  guided = config.loss.get("guidance") or config.model.get("guidance")
  if not dataset.normalizer:
    classes = dataset.num_classes if config.class_conditional else 0
    has = classes or any(map(guidance.is_empty_name, dataset.cond))
    if config.loss.get("guidance") and not (has and config.model.get("guidance")):
      raise UserError(
        f"config.loss.guidance={config.loss.guidance}: needs data with classes, "
        "config.class_conditional=True and config.model.guidance=True; or texts"
      )
    return
  for field, value in (("train.flip", config.train.flip), ("loss.guidance", guided)):
    if value:
      raise UserError(
        f"config.{field}={value}: needs images, but config.data are trajectories"
      )


def check_dtype(config: ml_collections.ConfigDict, platform: str) -> None:
  """Checks that the devices compute in the dtype of the network.

  Args:
    config: of the run.
    platform: of the devices: "cpu", "gpu" or "tpu".

  Raises:
    UserError: they do not.
  """
  if platform == "tpu" and config.model.get("dtype") == "float16":
    raise UserError(
      "config.model.dtype=float16: TPUs have no float16 units; use "
      "--config.model.dtype=bfloat16 --config.train.loss_scale=1"
    )


def check_writer(config: ml_collections.ConfigDict) -> None:
  """Checks that the packages of further writers are installed.

  Raises:
    UserError: one is not.
  """
  project = config.writer.wandb
  if project and importlib.util.find_spec("wandb") is None:
    raise UserError(
      f"config.writer.wandb={project}: needs the package wandb (pip install wandb)"
    )
