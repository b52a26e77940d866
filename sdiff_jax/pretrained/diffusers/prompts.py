"""Texts to make images of: written out, or COCO's captions."""

import json

from sdiff_jax.types import UserError


def read(prompts: str) -> list[str]:
  """Returns the texts of "a cat;a dog", or of a file of captions in its order.

  Args:
    prompts: texts with ";" between them, or a path that ends in .json, to a dict whose
      "annotations" are dicts with a "caption" (the format of COCO's captions).

  Raises:
    UserError: the file is missing, damaged or of another form, or there are no texts.
  """
  if prompts.endswith(".json"):
    return _of_file(prompts)
  texts = [text.strip() for text in prompts.split(";")]
  texts = [text for text in texts if text]
  if not texts:
    raise UserError(
      "config.generate.prompts is empty: write texts, 'a cat;a dog', or name a .json "
      "of captions"
    )
  return texts


def _of_file(path: str) -> list[str]:
  try:
    with open(path, encoding="utf-8") as file:
      found = json.load(file)
  except OSError as error:
    raise UserError(f"config.generate.prompts={path!r}: {error.strerror}") from None
  except ValueError as error:
    raise UserError(f"{path} is damaged, or no JSON: {error}") from None
  rows = found.get("annotations") if isinstance(found, dict) else None
  if not isinstance(rows, list) or not rows:
    raise UserError(f"{path} has no captions: it must have a list `annotations`")
  for k, row in enumerate(rows):
    caption = row.get("caption") if isinstance(row, dict) else None
    if not isinstance(caption, str) or not caption.strip():
      raise UserError(f"{path}: annotations[{k}] has no text `caption`")
  return [row["caption"].strip() for row in rows]
