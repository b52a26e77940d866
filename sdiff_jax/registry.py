"""Pieces of an experiment by name: losses, networks, data sets, solvers, jobs, ...

A piece is a function that registers itself under a kind and a name,

    @registry.register("losses", "scm")
    def build(*, network, sigma_d, p_mean=-1.0, ...): ...

The kind is the package below `sdiff_jax` that holds the built-in pieces. Pieces of other
projects register in the same way, from a module that is imported by the config file or
named in `config.plugins`. Arguments of a piece without a default are given by the caller,
those whose default is None where there is something to give; the others are the fields
of its section in a config. An argument whose default is a frozen dataclass contributes
the fields of the dataclass, so several pieces can share a list of options.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from sdiff_jax import fields as fields_lib
from sdiff_jax.fields import Field
from sdiff_jax.types import Json, UserError

Function = TypeVar("Function", bound=Callable[..., Any])


class Piece(NamedTuple):
  """A registered function.

  Attributes:
    build: the function.
    facts: what else it says of itself, by name; the kind decides which names there are.
  """

  build: Callable[..., Any]
  facts: Mapping[str, Any]


_PIECES: dict[tuple[str, str], Piece] = {}


def register(kind: str, name: str, **facts: Any) -> Callable[[Function], Function]:
  """Returns a decorator that makes a function known as piece `name` of a kind.

  The function then checks its arguments at every call: their annotations declare what
  they may be (see `sdiff_jax.fields`).

  Args:
    kind: package below `sdiff_jax` of such pieces: "losses", "models", "data", ...
    name: how configs and command lines call it.
    **facts: what else the piece says of itself (see `Piece`).

  Raises:
    ValueError: another function has that name already.

  Example:
    >>> @register("examples", "example")
    ... def build(*, network, sigma_d, weight=1.0): ...
    >>> fields("examples", "example"), required("examples", "example")
    ({'weight': 1.0}, ['network', 'sigma_d'])
  """

  def decorate(function: Function) -> Function:
    known = _PIECES.get((kind, name))
    if known and _source(known.build) != _source(function):
      raise ValueError(
        f"{kind}: {name!r} is registered twice, by {'.'.join(_source(known.build))} and "
        f"by {'.'.join(_source(function))}; rename one of them"
      )
    build = fields_lib.checked(function)
    _PIECES[kind, name] = Piece(build, facts)
    return build

  return decorate


def _source(function: Callable[..., Any]) -> tuple[str, str]:
  return function.__module__, function.__qualname__


def lookup(kind: str, name: str) -> Piece:
  """Returns the piece `name` of a kind; its module is imported if necessary.

  Args:
    kind: see `register`.
    name: of the piece.

  Raises:
    UserError: there is none; the message lists the known names.

  Example:
    >>> lookup("losses", "scm").build.__module__
    'sdiff_jax.losses.scm'
  """
  name = str(name)
  module = f"sdiff_jax.{kind}.{name}"
  known = (kind, name) in _PIECES
  if not known and name.isidentifier() and importlib.util.find_spec(module):
    importlib.import_module(module)
  if (kind, name) not in _PIECES and name not in names(kind):
    near = difflib.get_close_matches(name, names(kind), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{kind}: no {name!r}{hint}; known: {', '.join(names(kind))}")
  return _PIECES[kind, name]


def _modules(package: str) -> dict[str, pathlib.Path]:
  """Returns the files of a package's public modules, by name; subpackages are none."""
  folder = importlib.import_module(package).__path__[0]
  return {
    module.name: pathlib.Path(folder, f"{module.name}.py")
    for module in pkgutil.iter_modules([folder])
    if not module.ispkg and not module.name.startswith("_")
  }


@functools.cache
def import_modules(package: str) -> None:
  """Imports the public modules of a package, whose pieces then are registered.

  Args:
    package: dotted name, such as "sdiff_jax.losses".

  Example:
    >>> import_modules("sdiff_jax.losses")
  """
  for module in _modules(package):
    importlib.import_module(f"{package}.{module}")


def names(kind: str) -> list[str]:
  """Returns the names of all pieces of a kind, sorted; imports all of its modules.

  Args:
    kind: see `register`.

  Example:
    >>> {"ddpm", "scm"} <= set(names("losses"))
    True
  """
  import_modules(f"sdiff_jax.{kind}")
  return sorted(name for of, name in _PIECES if of == kind)


def summaries(kind: str) -> dict[str, str]:
  """Returns name -> first sentence of the documentation of each piece of a kind.

  Modules of this package are read but not imported, since that takes seconds; their
  names are those of their files. Pieces of other modules appear once registered.

  Args:
    kind: see `register`.

  Example:
    >>> summaries("data")["digits"]
    '1797 handwritten digits of 8 x 8 pixels that ship inside scikit-learn'
  """
  found = {}
  for module, path in _modules(f"sdiff_jax.{kind}").items():
    found[module] = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
  for (of, name), piece in _PIECES.items():
    if of == kind and name not in found:
      found[name] = inspect.getdoc(piece.build) or ""
  return {name: _first_sentence(text) for name, text in sorted(found.items())}


def _first_sentence(text: str) -> str:
  """Returns the first sentence of a documentation, without "Job `name`: " before it."""
  line = " ".join(text.partition("\n\n")[0].split()).partition(". ")[0]
  line = line.partition("`: ")[2] if line.startswith("Job `") else line
  return line.rstrip(".")


def fields(kind: str, name: str) -> dict[str, Json]:
  """Returns the config fields of a piece with their defaults.

  Fields are the arguments with a default other than None. An argument whose default is a
  frozen dataclass contributes the fields of the dataclass.

  Args:
    kind: see `register`.
    name: of the piece.

  Raises:
    UserError: there is no such piece.

  Example:
    >>> fields("losses", "diffusion")["p_mean"]
    -1.2
  """
  return {k: field.default for k, field in declarations(kind, name).items()}


def declarations(kind: str, name: str) -> dict[str, Field]:
  """Returns the config fields of a piece: what they may hold, and what they are.

  Args:
    kind: see `register`.
    name: of the piece.

  Raises:
    UserError: there is no such piece.

  Example:
    >>> declarations("losses", "diffusion")["p_std"].describe()
    'a number above 0'
  """
  out: dict[str, Field] = {}
  for argument, field in fields_lib.arguments(lookup(kind, name).build).items():
    if dataclasses.is_dataclass(field.default):
      for own, inner in fields_lib.arguments(type(field.default)).items():
        out[own] = inner._replace(default=getattr(field.default, own))
    elif field.default not in (inspect.Parameter.empty, None):
      out[argument] = field
  return out


def required(kind: str, name: str) -> list[str]:
  """Returns the arguments of a piece that are not config fields.

  Args:
    kind: see `register`.
    name: of the piece.

  Raises:
    UserError: there is no such piece.

  Example:
    >>> required("losses", "diffusion")
    ['network', 'sigma_d']
  """
  parameters = inspect.signature(lookup(kind, name).build).parameters.values()
  return [p.name for p in parameters if p.default in (p.empty, None)]


def check(kind: str, section: Mapping[str, Json], label: str) -> None:
  """Checks that a section {"name": ..., field: value} fits the piece that it names.

  Relations between fields are left to `build`.

  Args:
    kind: see `register`.
    section: the name of a piece, and values of its fields.
    label: name of the section for the message, such as "config.loss".

  Raises:
    UserError: there is no such piece, the piece does not have a field (the message has
      the nearest one), or a value is not what the field may hold.

  Example:
    >>> check("losses", {"name": "diffusion", "p_mean": 0.0}, "config.loss")
  """
  check_names(kind, section, label)
  with argument_errors(label):
    fields_lib.check_all(section, declarations(kind, section["name"]))


def check_names(kind: str, section: Mapping[str, Json], label: str) -> None:
  """Checks that a section names a piece, and fields that the piece has.

  Args:
    kind: see `register`.
    section: the name of a piece, and values of its fields.
    label: name of the section for the message.

  Raises:
    UserError: there is no such piece, or it has no such field.

  Example:
    >>> check_names("losses", {"name": "diffusion", "p_mean": 0.0}, "config.loss")
  """
  name = section.get("name")
  if not isinstance(name, str) or not name:
    raise UserError(
      f"{label}.name={fields_lib.quote(name)}: must be one of {', '.join(names(kind))}"
    )
  known = fields(kind, name)
  for field in sorted(section.keys() - {"name"} - known.keys()):
    near = difflib.get_close_matches(field, known, 1) or sorted(known)
    raise UserError(
      f"{label}.{field}: {kind}/{name} has no such field; did you mean "
      f"{', '.join(near)}? (another piece has other fields)"
    )


def build(kind: str, section: dict[str, Json], label: str = "", **given: Json) -> Json:
  """Builds the piece that a section names.

  Args:
    kind: "losses", "models", "data", ...
    section: {"name": ..., field: value}.
    label: name of the section, such as "config.loss"; put before the message of a
      ValueError, which starts with the name of the argument.
    **given: further arguments; those that the piece does not take are left out.

  Raises:
    UserError: the piece refused a value.

  Example:
    >>> build("data", {"name": "digits"}).size
    1797
  """
  function = lookup(kind, section["name"]).build
  accepted = inspect.signature(function).parameters
  given = {k: v for k, v in given.items() if k in accepted}
  options = {k: v for k, v in section.items() if k != "name"}
  check(kind, section, label)
  with argument_errors(label):
    for p in accepted.values():
      if dataclasses.is_dataclass(p.default) and not isinstance(p.default, type):
        own = {f.name for f in dataclasses.fields(p.default)} & options.keys()
        changed = {k: options.pop(k) for k in own}
        options[p.name] = dataclasses.replace(p.default, **changed)
    return function(**given, **options)


@contextlib.contextmanager
def argument_errors(label: str) -> Iterator[None]:
  """Turns a ValueError about an argument into a UserError about a field.

  Args:
    label: what the arguments are fields of, such as "config.sampler"; "" for nothing.

  Raises:
    UserError: "config.sampler.steps=0: must be at least 1" for the ValueError
      "steps=0: must be at least 1".

  Example:
    >>> with argument_errors("config.sampler"):
    ...   raise ValueError("steps=0: must be at least 1")
    Traceback (most recent call last):
    ...
    sdiff_jax.types.UserError: config.sampler.steps=0: must be at least 1
  """
  try:
    yield
  except ValueError as error:
    raise UserError(f"{label}.{error}" if label else str(error)) from error


def public_module(package: str, name: str) -> types.ModuleType:
  """Imports a public module of a package when it is first used as an attribute.

  Packages of pieces have it as their `__getattr__`, so `sdiff_jax.losses.scm` works
  without an import of its own.

  Args:
    package: dotted name of the package.
    name: of the attribute.

  Raises:
    AttributeError: the package has no such public module.

  Example:
    >>> public_module("sdiff_jax.losses", "scm").__name__
    'sdiff_jax.losses.scm'
  """
  module = f"{package}.{name}"
  if name.startswith("_") or importlib.util.find_spec(module) is None:
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
  return importlib.import_module(module)
