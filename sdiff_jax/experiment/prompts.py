"""Prompts of a network that was trained on texts, as conditions."""

import ml_collections
import numpy as np

from sdiff_jax.diffusion import guidance
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.pretrained.diffusers import prompts, text_encoding
from sdiff_jax.types import UserError


def read(
  config: ml_collections.ConfigDict, experiment: Experiment
) -> dict[str, np.ndarray] | None:
  """Returns the conditions of config.sample.prompts, each [n, ...]; None without any.

  Args:
    config: names the prompts, and the folder of the text encoders.
    experiment: gives the conditions that the network was trained with.

  Raises:
    UserError: the network takes no texts, or others than the folder's encoders make.
  """
  if not config.sample.prompts:
    return None
  if not experiment.has_texts:
    raise UserError(
      f"config.sample.prompts={config.sample.prompts}: the network was trained without "
      "texts; leave it empty"
    )
  if not config.text_encoder:
    raise UserError(
      "config.text_encoder is empty: name the folder whose text encoders encoded the "
      "captions of config.data"
    )
  with config_errors("config.sample"):
    texts = prompts.read(config.sample.prompts)
  encode, shapes = text_encoding.load(config.text_encoder)
  cond = experiment.dataset.cond
  wanted = {k: cond[k].shape for k in cond if guidance.empty_name(k) in cond}
  if shapes != wanted:
    raise UserError(
      f"config.text_encoder={config.text_encoder}: its texts are {shapes}, those of "
      f"config.data {wanted}"
    )
  values = encode([*texts, ""])
  out = {}
  for name, x in values.items():
    rows = x.astype(cond[name].dtype)
    out[name] = rows[:-1]
    out[guidance.empty_name(name)] = np.broadcast_to(rows[-1:], rows[:-1].shape)
  return out
