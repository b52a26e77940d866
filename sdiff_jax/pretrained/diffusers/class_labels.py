"""Classes of generated images: their numbers, or their names in model_index.json."""

import difflib
from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta

from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Field
from sdiff_jax.types import UserError

Names = Annotated[dict[str, str], Meta(max_length=1_000_000)]
FIELDS = {"id2label": Field({}, Names)}


def names(path: str) -> dict[str, int]:
  """Returns the class of each name of a model_index.json; a class has several names.

  Args:
    path: of the file, whose `id2label` is {"0": "tench, Tinca tinca", ...}.

  Raises:
    UserError: the file is missing or damaged, or `id2label` has another form.
  """
  index = config_fields.read_config(path)
  own = {name: index[name] for name in FIELDS if name in index}
  try:
    found = config_fields.validated_config(own, FIELDS, {})["id2label"]
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
  if wrong := [key for key in found if not key.isdecimal()]:
    raise UserError(
      f"{path}: id2label: its keys must be numbers of classes, not "
      f"{config_fields.quoted(wrong[0])}"
    )
  return {
    name.strip(): int(key) for key, value in found.items() for name in value.split(",")
  }


def read(labels: str, known: Mapping[str, int], classes: int) -> list[int]:
  """Returns classes.

  Args:
    labels: names or numbers of classes, separated by ";"; "" for all.
    known: the class of each name.
    classes: number of classes.

  Raises:
    ValueError: there is no such class.

  Example:
    >>> read("goldfish; 0", {"goldfish": 1}, classes=2)
    [1, 0]
  """
  texts = [text.strip() for text in labels.split(";")]
  found: list[int] = []
  for text in filter(None, texts):
    number = known.get(text, int(text) if text.isdecimal() else -1)
    if not 0 <= number < classes:
      near = difflib.get_close_matches(text, known, 1)
      hint = f" (did you mean {near[0]!r}?)" if near else ""
      raise ValueError(
        f"labels={config_fields.quoted(text)}: must be a class, 0 to {classes - 1}, or its "
        f"name in model_index.json{hint}"
      )
    found.append(number)
  return found or [*range(classes)]
