"""Finds pieces by name: `models/dit.py` is ("models", "dit").

A piece is a module that exports `build(*, given, ..., field=default, ...)`. Arguments
without a default are given by the job, those whose default is None where there is
something to give; the others are the fields of its section in a config, so a new piece
is a new file and nothing else.
"""

import difflib
import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

from sdiff_jax.types import UserError


def lookup(package: str, name: str) -> ModuleType:
  """Returns the module sdiff_jax.<package>.<name>.

  Raises:
    UserError: there is none, or it builds nothing; the message lists what exists.
  """
  full = f"sdiff_jax.{package}.{name}"
  try:
    module = importlib.import_module(full)
  except ModuleNotFoundError as error:
    if error.name != full:
      raise
    module = None
  if module is None or not hasattr(module, "build"):
    raise UserError(f"{package}: no {name!r}; there are {', '.join(names(package))}")
  return module


def names(package: str) -> list[str]:
  """Returns the names of all pieces of a package."""
  parent = importlib.import_module(f"sdiff_jax.{package}")
  found = [m.name for m in pkgutil.iter_modules(parent.__path__)]
  modules = {n: importlib.import_module(f"{parent.__name__}.{n}") for n in found}
  return sorted(n for n, m in modules.items() if hasattr(m, "build"))


def fields(package: str, name: str) -> dict[str, Any]:
  """Returns the config fields of a piece with their defaults."""
  parameters = inspect.signature(lookup(package, name).build).parameters.values()
  return {p.name: p.default for p in parameters if p.default not in (p.empty, None)}


def given(package: str, name: str) -> list[str]:
  """Returns the arguments of a piece that are no fields."""
  parameters = inspect.signature(lookup(package, name).build).parameters
  return [p for p in parameters if p not in fields(package, name)]


def check(package: str, section: dict[str, Any], label: str) -> None:
  """Checks that a section {"name": ..., field: value} fits the piece it names.

  Raises:
    UserError: a field that the piece does not have, with the nearest that it has.
  """
  known = fields(package, section["name"])
  for field in sorted(section.keys() - {"name"} - known.keys()):
    near = difflib.get_close_matches(field, known, 1) or sorted(known)
    raise UserError(
      f"{label}.{field}: {package}/{section['name']} has no such field; did you mean "
      f"{', '.join(near)}? (a section for another piece is made by config.use)"
    )


def build(package: str, section: dict[str, Any], **given: Any) -> Any:
  """Builds the piece that a section names.

  Args:
    package: "losses", "models", "data", ...
    section: {"name": ..., field: value}.
    **given: arguments of the job; those that the piece does not take are left out.

  Raises:
    UserError: the piece refused a value; the message is the piece's own.
  """
  function = lookup(package, section["name"]).build
  wanted = inspect.signature(function).parameters
  given = {k: v for k, v in given.items() if k in wanted}
  chosen = {k: v for k, v in section.items() if k != "name"}
  try:
    return function(**given, **chosen)
  except ValueError as error:
    raise UserError(str(error)) from error
