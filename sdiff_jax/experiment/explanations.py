"""What --help=FIELD prints."""

import difflib
import textwrap

from sdiff_jax import config as configs
from sdiff_jax import registry
from sdiff_jax.fields import Field
from sdiff_jax.types import UserError


def explain(name: str) -> str:
  """Returns what a field is, what it may be and its default, for --help=FIELD.

  Args:
    name: "section.field", a field outside of sections, or a section. Fields of components
      are listed for each component that has them; "model.dit" are those of one.

  Raises:
    UserError: there is no such field.

  Example:
    >>> print(explain("optim.b1"))
    optim.b1 = 0.9
      a number of at least 0 and below 1
      decay of the first moment.
  """
  known = {
    f"{section}.{field}" if section else field: declared
    for section, members in configs.declarations().items()
    for field, declared in members.items()
  }
  for section, kind in configs.PIECES.items():
    for piece in registry.names(kind):
      for field, declared in registry.declarations(kind, piece).items():
        known[f"{section}.{field} of {piece}"] = declared
  section, _, field = name.partition(".")
  inside = [k for k in known if k.startswith(f"{section}.")]
  matches = [k for k in known if k.partition(" of ")[0] == name]
  matches += [k for k in inside if not field or k.endswith(f" of {field}")]
  if not matches:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"--help={name[:80]}: there is no such field{hint}")
  return "\n".join(_explanation(k, known[k]) for k in matches)


def _explanation(name: str, field: Field) -> str:
  indent = {"initial_indent": "  ", "subsequent_indent": "  ", "width": 88}
  lines = [f"{name} = {field.default!r}", f"  {field.describe()}"]
  return "\n".join([*lines, *textwrap.wrap(field.doc, **indent)])
