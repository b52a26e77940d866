"""Shows the `Example:` blocks of docstrings as code (griffe's name is `Examples:`)."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
  """Renames the section before docstrings are parsed."""

  def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Called for every module, class and function."""
    del kwargs
    if obj.docstring:
      obj.docstring.value = re.sub(
        r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
      )
