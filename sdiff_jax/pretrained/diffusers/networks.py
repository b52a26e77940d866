"""Interface and weights of the networks of the diffusers format."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sdiff_jax.pretrained.files import state_dict
from sdiff_jax.pretrained.files.state_dict import Tensor
from sdiff_jax.types import Array, Json, Params, PRNGKey, PyTree, UserError

LEGACY = {  # names of attention layers in files of 2022 -> present names
  "query": "to_q",
  "key": "to_k",
  "value": "to_v",
  "proj_attn": "to_out.0",
}
# In text encoders of transformers 4: a prefix of all names, and a constant 0, 1, 2, ...
PREFIX, POSITIONS = "text_model.", "embeddings.position_ids"
# What torch.compile puts anywhere into names, and DataParallel before them.
COMPILED, PARALLEL = "_orig_mod", "module."
TIED = "encoder.embed_tokens.weight"  # of T5, the same as shared.weight
TIME_IDS = (
  6  # heights and widths: of the original image, of the crop's corner, and ours
)


def _hidden(texts: Mapping[str, Any]) -> dict[str, Array]:
  """Returns the condition of Stable Diffusion 1 and 2."""
  return {"text": texts["text_encoder"].hidden}


class Predictor(NamedTuple):
  """A network that predicts eps, v or x0 of a process with discrete timesteps.

  Attributes:
    init: (key) -> params.
    apply: (params, x [B, H, W, C], time [B], cond) -> prediction [B, H, W, C], in
      float32 or wider; cond is None, or has "text" [B, L, E], "pooled" [B, P],
      "distilled_guidance" [B], "time_ids" [B, 6], "end_time" [B] and "label" int [B],
      as far as the network takes them.
    shape: (H, W, C) of its training samples.
    text: E, size of the text embeddings, or None.
    pooled: P, size of the embedding of a whole text, or None.
    guided: whether the network takes a guidance scale as an input.
    patch: side of the square of latents that is one token of a transformer.
    conditions: texts of the encoders, by the names of their folders -> what the network
      takes of them, "text" and "pooled".
    long_text: number of tokens of T5's or Gemma's encoder.
    masked: whether padding of texts is not attended to ("mask" bool [B, L] is one more
      condition), and texts are in lower case.
    spacing: of the noise levels before their shift; "" for the scheduler's own.
    classes: number of classes, for a network that takes "label"; a negative one is no
      class.
    sized: whether the network takes "time_ids", sizes of the image in pixels.
    end_time: whether it is a flow map, which takes "end_time", a timestep.
    lists: names of its lists of blocks, of which alike ones may be stacked (see
      `block_loop`).
  """

  init: Callable[[PRNGKey], Params]
  apply: Callable[..., Array]
  shape: tuple[int, int, int]
  text: int | None
  pooled: int | None = None
  guided: bool = False
  patch: int = 1
  conditions: Callable[[Mapping[str, Any]], dict[str, Array]] = _hidden
  long_text: int = 0
  masked: bool = False
  spacing: str = ""
  classes: int = 0
  sized: bool = False
  end_time: bool = False
  lists: tuple[str, ...] = ()


class FromConfig(Protocol):
  """The function `from_config` of the module of a network."""

  def __call__(
    self, config: dict[str, Json], *, dtype: str = "float32", remat: str = ""
  ) -> Any:
    """Returns a `Predictor`, an `Autoencoder` or a `TextEncoder`, without weights.

    Args:
      config: fields of a config.json; missing ones have the defaults of diffusers or of
        transformers.
      dtype: type of the hidden layers.
      remat: what a block recomputes in the backward pass: "" nothing, "weights" what it
        gathers from other devices, "dots" everything but matrix products and
        convolutions, "full" everything.

    Raises:
      ValueError: lists unknown fields and unsupported values; or sizes that do not fit.
    """


def abstract_params(init: Callable, *, dtype: str) -> Params:
  """Returns the parameters of `init` as ShapeDtypeStructs of a type."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)),
    jax.eval_shape(init, jax.random.key(0)),
  )


def load_state_dict(
  tensors: Mapping[str, Tensor],
  init: Callable,
  *,
  dtype: str,
  path: str,
  network: str = "the network",
  place: Callable[[Params], PyTree] | None = None,
) -> Params:
  """Returns the parameters that a state dict holds.

  Args:
    tensors: by their names in PyTorch.
    init: (key) -> params, whose nested keys are the parts of those names.
    dtype: of the parameters.
    path: of the file, at the start of the message of an error.
    network: what the message calls the network.
    place: shapes of the parameters -> their shardings; None for the host.

  Raises:
    UserError: lists tensors that are missing, left over or of another shape.
  """
  like = abstract_params(init, dtype=dtype)
  renamed: dict[str, Tensor] = {}
  for name, x in tensors.items():
    present = present_name(name)
    if present in renamed:
      raise UserError(f"{path}: two tensors have the name {present}, with a prefix")
    if present != POSITIONS and not (present == TIED and "shared.weight" in tensors):
      renamed[present] = x
  kinds = sorted({str(x.dtype) for x in renamed.values()})
  if narrow := [kind for kind in kinds if kind.startswith("float8")]:
    print(f"{path}: weights of {', '.join(narrow)} become {dtype}", file=sys.stderr)
  return state_dict.match_params(
    renamed,
    like,
    to_state_dict,
    network=network,
    path=path,
    shardings=None if place is None else place(like),
  )


def present_name(name: str) -> str:
  """Returns the present name of a tensor in PyTorch, without what wrappers add.

  Args:
    name: in a file.

  Example:
    >>> present_name("module._orig_mod.mid_block.attentions.0.query.weight")
    'mid_block.attentions.0.to_q.weight'
  """
  parts = name.removeprefix(PARALLEL).split(".")
  parts = [LEGACY.get(part, part) for part in parts if part != COMPILED]
  return ".".join(parts).removeprefix(PARALLEL).removeprefix(PREFIX)


def to_state_dict(keys: tuple[str, ...]) -> str:
  """Returns the PyTorch name of a parameter from its nested keys."""
  last = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
  return ".".join((*keys[:-1], last.get(keys[-1], keys[-1])))
