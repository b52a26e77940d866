"""The text encoders of a folder in the diffusers format, without its other networks."""

import functools
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.pretrained.diffusers import fit, hub, loading
from sdiff_jax.pretrained.diffusers import weights as weights_lib
from sdiff_jax.pretrained.diffusers.model import Model
from sdiff_jax.types import Array, Params, UserError

# texts, n of them -> condition of the network -> values float32 [n, ...]
EncodeTexts = Callable[[Sequence[str]], dict[str, np.ndarray]]


def load(
  path: str, batch_size: int = 16, *, dtype: str = "float32"
) -> tuple[EncodeTexts, dict[str, tuple[int, ...]]]:
  """Returns the function from texts to conditions, and the shapes of one text's.

  Args:
    path: of the folder, or hf://organization/name.
    batch_size: texts that are encoded at once.
    dtype: of the hidden layers and of the weights.

  Raises:
    UserError: a file is missing or damaged, or the folder has no text encoder.
  """
  folder = hub.local(path)
  configs = loading.configs(folder)
  needed = {k: v for k, v in configs.items() if k != "vae"}
  model = loading.abstract(needed, dtype=dtype)
  model = model._replace(tokenizers=loading.tokenizers(folder, model))
  if not model.text_encoders or not model.tokenizers:
    raise UserError(f"{path}: has no text encoder with a tokenizer")
  params = {
    name: weights_lib.parameters(os.path.join(folder, name), encoder, dtype=dtype)
    for name, encoder in model.text_encoders.items()
    if name in fit.ENCODERS
  }

  jitted = jax.jit(functools.partial(_conditions, model))

  def encode(texts: Sequence[str]) -> dict[str, np.ndarray]:
    parts = []
    for first in range(0, len(texts), batch_size):
      some = [*texts[first : first + batch_size]]
      filled = some + [""] * (batch_size - len(some))
      tokens = {
        name: jnp.asarray(model.tokenizers[name].encode(filled))
        for name in model.text_encoders
      }
      values = jitted(params, tokens)
      parts.append(
        {k: np.asarray(v, np.float32)[: len(some)] for k, v in values.items()}
      )
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

  return encode, shapes(model, params)


def shapes(model: Model, params: dict[str, Params]) -> dict[str, tuple[int, ...]]:
  """Returns condition -> its shape for one text.

  Args:
    model: with text encoders.
    params: of the model, which may be abstract.
  """
  ids = {k: jax.ShapeDtypeStruct((1, n), jnp.int32) for k, n in model.lengths.items()}
  shaped = jax.eval_shape(functools.partial(_conditions, model), params, ids)
  return {name: x.shape[1:] for name, x in shaped.items()}


def _conditions(
  model: Model, params: dict[str, Params], tokens: dict[str, Array]
) -> dict[str, Array]:
  """Returns the conditions that texts are, without the sizes of images."""
  cond = model.encode(params, tokens) or {}
  return {name: x for name, x in cond.items() if name != "time_ids"}
