"""Whether the parts of a folder in the diffusers format fit each other."""

from typing import Any

import jax
import jax.numpy as jnp

from sdiff_jax.pretrained.diffusers.networks import Predictor
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.types import Array, Params

MAX_MESSAGE = 470  # characters, of all problems of a folder
PROBLEM = 100, 190  # least and most characters of one of several problems
SUFFIXES = ("", "_2", "_3")  # of text encoders and tokenizers
PREDICTORS = ("unet", "transformer")  # of which a folder has one
ENCODERS = tuple(f"text_encoder{suffix}" for suffix in SUFFIXES)


def listed(folder: str, problems: list[str]) -> str:
  """Returns all problems of a folder in one line, each cut to its part of it.

  Args:
    folder: of the model.
    problems: messages.

  Example:
    >>> listed("sd3", ["sd3/vae: no", "sd3/unet: no"])
    'sd3: vae: no; unet: no'
  """
  problems = [problem.removeprefix(f"{folder}/") for problem in problems]
  left, parts = MAX_MESSAGE - len(folder), []
  for problem, rest in zip(problems, reversed(range(len(problems))), strict=True):
    room = max(min(PROBLEM[1], left - PROBLEM[0] * rest), PROBLEM[0] // 2)
    parts.append(config_fields.quoted(problem, str, room))
    left -= len(parts[-1])
  return f"{folder}: " + "; ".join(parts)


def misfits(networks: dict[str, Any]) -> list[str]:
  """Returns inconsistencies between the parts.

  Args:
    networks: by the names of their folders.
  """
  part = next((name for name in PREDICTORS if name in networks), "")
  encoders = {name: networks[name] for name in ENCODERS if name in networks}
  unet, vae_, problems = networks.get(part), networks.get("vae"), []
  if unet is None:
    return []
  if encoders and unet.text is not None:
    problems += _text_misfits(part, unet, encoders)
  if vae_ is not None and unet.shape[-1] != vae_.channels:
    problems.append(
      f"the {part} has in_channels={unet.shape[-1]}, the vae latent_channels="
      f"{vae_.channels}"
    )
  return problems


def text(unet: Predictor, encoder: Any, params: Params, ids: Array) -> Any:
  """Returns what an encoder makes of texts for a network.

  Args:
    unet: the network, which says whether padding is left out.
    encoder: a text encoder.
    params: of the encoder.
    ids: of the tokens, int32 [B, L].
  """
  if not unet.masked:
    return encoder.apply(params, ids)
  return encoder.apply(params, ids, ids != encoder.padding)


def _text_misfits(part: str, unet: Predictor, encoders: dict[str, Any]) -> list[str]:
  """Returns what of the text encoders does not fit the network."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  names = f"{', '.join(encoders)} return{'s' if len(encoders) == 1 else ''}"
  try:
    texts = {
      name: jax.eval_shape(lambda k, ids, e=e: text(unet, e, e.init(k), ids), key, ids)
      for name, e in encoders.items()
    }
    found = jax.eval_shape(unet.conditions, texts)
  except KeyError as error:
    return [f"the {part} takes the texts of {error.args[0]}, which is not there"]
  except (AttributeError, TypeError, ValueError):  # an encoder of another kind
    return [f"the {part} does not take texts as {names} them"]
  wanted = {"text": unet.text, "pooled": unet.pooled}
  return [
    f"the {part} takes {name} embeddings of size {wanted[name]}, the {names} "
    f"{x.shape[-1]}"
    for name, x in found.items()
    if name in wanted and x.shape[-1] != wanted[name]
  ]
