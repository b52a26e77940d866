"""The text encoders of a folder in the diffusers format, without its other networks."""

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from sdiff_jax.distributed import sharding
from sdiff_jax.pretrained.diffusers import fit, hub, loading
from sdiff_jax.pretrained.diffusers import weights as weights_lib
from sdiff_jax.pretrained.diffusers.model import Model
from sdiff_jax.types import Array, Params, UserError

# Texts, n of them -> name of a text encoder, as "tokens", "tokens_2" -> int32 [n, L].
Tokenize = Callable[[Sequence[str]], dict[str, np.ndarray]]
# Such tokens -> condition of the network -> values float32 [n, ...].
Encode = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


class TextEncoders(NamedTuple):
  """From texts to conditions.

  Attributes:
    tokenize: texts -> tokens.
    encode: tokens -> conditions, on the devices of this process; reads the weights at
      its first call, and can be called from several threads.
    shapes: condition -> shape of one text's values.
  """

  tokenize: Tokenize
  encode: Encode
  shapes: dict[str, tuple[int, ...]]


def load(path: str, batch_size: int = 16, *, dtype: str = "float32") -> TextEncoders:
  """Returns the text encoders of a folder.

  Args:
    path: of the folder, or hf://organization/name.
    batch_size: texts that are encoded at once; rounded up to a multiple of the devices.
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
  names = {name: name.replace("text_encoder", "tokens") for name in model.text_encoders}

  def tokenize(texts: Sequence[str]) -> dict[str, np.ndarray]:
    return {k: model.tokenizers[name].encode(texts) for name, k in names.items()}

  return TextEncoders(
    tokenize,
    _encode_fn(folder, model, names, batch_size, dtype),
    shapes(model, model.params),
  )


def _encode_fn(
  folder: str, model: Model, names: Mapping[str, str], batch_size: int, dtype: str
) -> Encode:
  """Returns the function from tokens to conditions, a batch at a time."""
  local, lock = sharding.local(), threading.Lock()
  everywhere, devices = sharding.replicated(local.mesh), local.mesh.size
  size = -(-batch_size // devices) * devices

  @functools.cache
  def weights() -> dict[str, Params]:
    params = {
      name: weights_lib.parameters(os.path.join(folder, name), encoder, dtype=dtype)
      for name, encoder in model.text_encoders.items()
      if name in fit.ENCODERS
    }
    return jax.device_put(params, everywhere)

  # Devices do not communicate, so that threads may start programs in any order, while
  # the network is trained on the same devices.
  conditions = jax.jit(
    jax.shard_map(
      functools.partial(_conditions, model),
      mesh=local.mesh,
      in_specs=(everywhere.spec, local.spec),
      out_specs=local.spec,
      check_vma=False,
    )
  )

  def encode(tokens: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    with lock:
      params = weights()
    parts, count = [], len(next(iter(tokens.values())))
    for first in range(0, count, size):
      rows = np.minimum(np.arange(first, first + size), count - 1)  # filled by the last
      ids = {name: np.asarray(tokens[k][rows], np.int32) for name, k in names.items()}
      values = conditions(params, jax.device_put(ids, local))
      kept = min(size, count - first)
      parts.append({k: np.asarray(v, np.float32)[:kept] for k, v in values.items()})
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

  return encode


def shapes(model: Model, params: dict[str, Params]) -> dict[str, tuple[int, ...]]:
  """Returns condition -> its shape for one text.

  Args:
    model: with text encoders.
    params: of the model, which may be abstract.
  """
  ids = {k: jax.ShapeDtypeStruct((1, n), np.int32) for k, n in model.lengths.items()}
  shaped = jax.eval_shape(functools.partial(_conditions, model), params, ids)
  return {name: x.shape[1:] for name, x in shaped.items()}


def _conditions(
  model: Model, params: dict[str, Params], tokens: dict[str, Array]
) -> dict[str, Array]:
  """Returns the conditions that texts are, without the sizes of images."""
  cond = model.encode(params, tokens) or {}
  return {name: x for name, x in cond.items() if name != "time_ids"}
