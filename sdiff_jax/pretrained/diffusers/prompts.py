"""Prompts of generated images: texts, or a file of COCO captions."""

from sdiff_jax.io import records
from sdiff_jax.types import UserError

MAX_BYTES = 256 << 20  # COCO's captions of 118,287 images have 92 MB


def read(prompts: str) -> list[str]:
  """Returns prompts.

  Args:
    prompts: texts separated by ";", or the path of a .json file in the format of COCO's
      captions, whose order is kept.

  Raises:
    ValueError: there are no texts.
    UserError: the file is missing or damaged, or has another format.

  Example:
    >>> read("a cat; a dog")
    ['a cat', 'a dog']
  """
  if prompts.endswith(".json"):
    return _captions(prompts)
  texts = [text.strip() for text in prompts.split(";")]
  texts = [text for text in texts if text]
  if not texts:
    raise ValueError(
      f"prompts={prompts!r}: must have texts, 'a cat;a dog', or be the path of a .json "
      "file of captions"
    )
  return texts


def _captions(path: str) -> list[str]:
  """Returns the captions of a file."""
  content = records.read_json(path, max_bytes=MAX_BYTES)
  annotations = content.get("annotations") if isinstance(content, dict) else None
  if not isinstance(annotations, list) or not annotations:
    raise UserError(f"{path} has no captions: it must have a list `annotations`")
  for k, annotation in enumerate(annotations):
    caption = annotation.get("caption") if isinstance(annotation, dict) else None
    if not isinstance(caption, str) or not caption.strip():
      raise UserError(f"{path}: annotations[{k}] has no text `caption`")
  return [annotation["caption"].strip() for annotation in annotations]
