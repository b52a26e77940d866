"""Prompts of samples: as conditions of a network, and as texts to compare them with."""

import ml_collections
import numpy as np

from sdiff_jax.data import folder
from sdiff_jax.diffusion import guidance
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.io import image_io, records
from sdiff_jax.pretrained.diffusers import prompts, text_encoding
from sdiff_jax.types import Json, UserError


def texts(config: ml_collections.ConfigDict) -> list[str]:
  """Returns the texts of config.sample.prompts; sample k has that of k modulo n.

  Raises:
    UserError: there are none, or the file of captions is missing or damaged.
  """
  with config_errors("config.sample"):
    return prompts.read(config.sample.prompts)


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
  captions = texts(config)
  encoders = text_encoding.load(config.text_encoder)
  cond = experiment.dataset.cond
  wanted = {k: cond[k].shape for k in cond if guidance.empty_name(k) in cond}
  if encoders.shapes != wanted:
    raise UserError(
      f"config.text_encoder={config.text_encoder}: its texts are {encoders.shapes}, "
      f"those of config.data {wanted}"
    )
  values = encoders.encode(encoders.tokenize([*captions, ""]))
  out = {}
  for name, x in values.items():
    rows = x.astype(cond[name].dtype)
    out[name] = rows[:-1]
    out[guidance.empty_name(name)] = np.broadcast_to(rows[-1:], rows[:-1].shape)
  return out


def of_images(directory: str) -> list[str]:
  """Returns the prompt of each image in a folder that the job `generate` made.

  Raises:
    UserError: a file holds no prompt.
  """
  found = []
  for path in folder.files(directory):
    try:
      about = records.decode(image_io.about(path), dict[str, Json], path)
      prompt = about["prompt"]
      if not isinstance(prompt, str):
        raise TypeError("the prompt is no text")
      found.append(prompt)
    except (*folder.UNREADABLE, UserError) as error:
      raise UserError(
        f"{path} holds no prompt: the CLIP score is of images of the job generate"
      ) from error
  return found


def of_samples(config: ml_collections.ConfigDict) -> list[str] | None:
  """Returns the prompt of each sample, None without evaluate.clip.

  Raises:
    UserError: the samples have no prompts.
  """
  if not config.evaluate.clip:
    return None
  if not config.sample.prompts:
    raise UserError(
      f"config.evaluate.clip={config.evaluate.clip}: the CLIP score is of samples of "
      "prompts; set config.sample.prompts"
    )
  captions = texts(config)
  return [captions[k % len(captions)] for k in range(config.evaluate.num)]
