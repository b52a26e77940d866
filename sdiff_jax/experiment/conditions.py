"""What the images of a published model are conditioned on: texts, classes or nothing."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sdiff_jax.diffusion import guidance
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.experiment.pipelines import Inputs
from sdiff_jax.pretrained.diffusers import class_labels
from sdiff_jax.pretrained.diffusers import prompts as prompts_lib
from sdiff_jax.pretrained.diffusers.model import Model
from sdiff_jax.types import Array, Cond, Params, UserError

LABEL, NEGATIVE = "label", "negative_"


class Conditions(NamedTuple):
  """The conditions of a model as inputs of its pipeline.

  Attributes:
    shapes: batch size -> shapes of the inputs, by name.
    shared: names of the inputs that all images share.
    encode: (params, inputs) -> conditions [B, ...] by name, and those of F_u in
      classifier-free guidance, without a batch axis; None and None for a model without
      conditions.
    rows: numbers of images int [B] -> the inputs.
  """

  shapes: Callable[[int], dict[str, jax.ShapeDtypeStruct]]
  shared: frozenset[str]
  encode: Callable[[Params, Inputs], tuple[Cond, Cond]]
  rows: Callable[[np.ndarray], dict[str, np.ndarray]]


NOTHING = Conditions(
  lambda size: {}, frozenset(), lambda params, inputs: (None, None), lambda indices: {}
)


def from_config(
  config: ml_collections.ConfigDict, model: Model, prompts: list[str]
) -> tuple[list[str | None], Sequence[int]]:
  """Returns the prompts of images, [None] for a model without text, and their classes.

  Args:
    config: of the job `generate`.
    model: with texts, with classes, or with neither.
    prompts: those of config.generate; [] if there are none.

  Raises:
    UserError: a field does not fit the model.
  """
  section, scale = config.generate, config.sample.guidance
  classes, has_text = model.unet.classes, model.unet.text is not None
  if not has_text and (prompts or section.negative_prompt):
    raise UserError(
      f"{section.folder} takes no text: leave config.generate.prompts and "
      "negative_prompt empty"
    )
  if not has_text and not classes and scale != 1:
    raise UserError(
      f"config.sample.guidance={scale}: must be 1, since {section.folder} takes no text "
      "and no class"
    )
  if section.labels and not classes:
    raise UserError(
      f"config.generate.labels={section.labels!r}: {section.folder} has no classes"
    )
  with config_errors("config.generate"):
    if classes:
      return [None], class_labels.read(section.labels, model.labels, classes)
    if not has_text:
      return [None], ()
    if model.text_encoder is None or model.tokenizer is None:
      raise UserError(f"{section.folder} has no text encoder, or no tokenizer")
    if section.negative_prompt and scale == 1:
      raise ValueError("negative_prompt: has no effect with config.sample.guidance=1")
    return prompts or prompts_lib.read(section.prompts), ()


def of_model(
  model: Model,
  *,
  prompts: Sequence[str | None] = (None,),
  negative_prompt: str = "",
  distilled_guidance: float = 1.0,
  labels: Sequence[int] = (),
) -> Conditions:
  """Returns the conditions that a model takes.

  Args:
    model: with texts, with classes, or with neither.
    prompts: image k has prompt k modulo their number; (None,) without text.
    negative_prompt: text that guidance leads away from.
    distilled_guidance: scale that a network takes as an input, without a negative prompt.
    labels: image k has class k modulo their number; () for all classes in turn.
  """
  if model.unet.classes:
    return of_classes(labels or range(model.unet.classes))
  if model.text_encoders:
    return of_texts(model, prompts, negative_prompt, distilled_guidance)
  return NOTHING


def of_classes(labels: Sequence[int]) -> Conditions:
  """Returns the conditions of a model with classes.

  Args:
    labels: image k has class k modulo their number.

  Example:
    >>> of_classes([7, 5]).rows(np.arange(3))["label"].tolist()
    [7, 5, 7]
  """

  def rows(indices: np.ndarray) -> dict[str, np.ndarray]:
    return {LABEL: np.array([labels[k % len(labels)] for k in indices], np.int32)}

  return Conditions(
    lambda size: {LABEL: jax.ShapeDtypeStruct((size,), jnp.int32)},
    frozenset(),
    lambda params, inputs: (
      {LABEL: inputs[LABEL]},
      {LABEL: jnp.asarray(guidance.NO_LABEL, jnp.int32)},
    ),
    rows,
  )


def of_texts(
  model: Model,
  prompts: Sequence[str | None],
  negative_prompt: str = "",
  distilled_guidance: float = 1.0,
) -> Conditions:
  """Returns the conditions of a model with texts; see `of_model`.

  It can be built without tokenizers, which only `rows` needs.
  """
  # The names of the tokens of each text encoder: tokens, tokens_2, ...
  names = {name: name.replace("text_encoder", "tokens") for name in model.text_encoders}

  def texts(params: Params, inputs: Inputs, prefix: str = "") -> dict[str, Array]:
    ids = {k: inputs[f"{prefix}{name}"] for k, name in names.items()}
    cond = dict(model.encode(params, ids))
    if model.unet.guided:
      scales = jnp.full(len(cond["text"]), distilled_guidance, jnp.float32)
      cond["distilled_guidance"] = scales
    return cond

  def encode(params: Params, inputs: Inputs) -> tuple[Cond, Cond]:
    empty = {k: v[0] for k, v in texts(params, inputs, NEGATIVE).items()}
    if model.force_zeros_for_empty_prompt and not negative_prompt:
      empty |= {k: jnp.zeros_like(empty[k]) for k in ("text", "pooled") if k in empty}
    return texts(params, inputs), empty

  def shapes(batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
      f"{prefix}{names[name]}": jax.ShapeDtypeStruct((size, length), jnp.int32)
      for prefix, size, lengths in (
        ("", batch_size, model.lengths),
        (NEGATIVE, 1, model.negative_lengths),
      )
      for name, length in lengths.items()
    }

  def rows(indices: np.ndarray) -> dict[str, np.ndarray]:
    own = tokens(model, [prompts[k % len(prompts)] or "" for k in indices])
    return own | tokens(model, [negative_prompt], NEGATIVE)

  shared = frozenset(f"{NEGATIVE}{name}" for name in names.values())
  return Conditions(shapes, shared, encode, rows)


def tokens(
  model: Model, texts: Sequence[str], prefix: str = ""
) -> dict[str, np.ndarray]:
  """Returns the inputs of a pipeline that texts are: "tokens", "tokens_2", ...

  Args:
    model: with tokenizers.
    texts: prompts, B of them.
    prefix: of the names; "negative_" for a negative prompt.
  """
  tokenizers = dict(model.tokenizers)
  if not prefix:
    tokenizers |= model.instructed
  return {
    f"{prefix}{name.replace('text_encoder', 'tokens')}": tokenizer.encode(texts)
    for name, tokenizer in tokenizers.items()
    if name in model.text_encoders
  }
