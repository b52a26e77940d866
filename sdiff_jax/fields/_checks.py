"""Checks of values by the annotations of arguments."""

import functools
import inspect
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from sdiff_jax.fields._vocabulary import Choices, Length, Place, Range

Function = TypeVar("Function", bound=Callable[..., Any])
Kind = Any  # the type in an annotation, which may be any of those of typing
Facts = dict[type, Any]  # what an annotation says besides, by type
MAX_INT = 2**31 - 1  # of the integers in compiled programs
MAX_FLOAT = 3.4e38  # of float32
MAX_QUOTED = 80  # characters of a value in a message
NOUNS: dict[object, str] = {
  bool: "True or False",
  int: "an integer",
  float: "a number",
  str: "a text",
}
PLURALS: dict[object, str] = {
  bool: "booleans",
  int: "integers",
  float: "numbers",
  str: "texts",
}


class Field(NamedTuple):
  """A field and what it may hold.

  Attributes:
    annotation: of the argument.
    default: its value if it is not set.
    doc: what it is.
  """

  annotation: object
  default: Any
  doc: str = ""

  def describe(self) -> str:
    """Returns what the field may hold."""
    return describe(self.annotation)


def quote(value: object) -> str:
  """Returns the representation of a value, of bounded length.

  Args:
    value: to be quoted in a message.

  Example:
    >>> quote("a" * 100)[-12:]
    'aaaaaaaaa...'
  """
  try:
    text = repr(value)
  except ValueError:  # Python refuses to write integers of more than 4300 digits
    text = "a huge integer"
  return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "..."


def check(name: str, value: object, annotation: object) -> None:
  """Checks that a value fits an annotation.

  Args:
    name: of the argument, for the message.
    value: of the argument.
    annotation: of the argument; types that are not declarations accept everything.

  Raises:
    ValueError: it does not; the message names the argument, the value and what it may be.

  Example:
    >>> check("width", 0, Annotated[int, Range(1, 8)])
    Traceback (most recent call last):
    ...
    ValueError: width=0: must be from 1 to 8
  """
  if problem := _problem(value, annotation):
    raise ValueError(f"{name}={quote(value)}: must be {problem}")


def describe(annotation: object) -> str:
  """Returns what an annotation accepts, as the end of "must be ...".

  Args:
    annotation: of an argument.

  Example:
    >>> describe(Annotated[tuple[float, ...], Range(0), Length(1, 2)])
    'a tuple of 1 to 2 numbers, each at least 0'
  """
  kind, facts = _split(annotation)
  if names := _choices(kind, facts):
    return f"one of {', '.join(names)}"
  if typing.get_origin(kind) is tuple:
    length, element = _tuple(kind, facts)
    _, inner = _split(element)
    each = ", each " if facts.get(Range) or inner.get(Range) else ""
    if choices := _choices(*_split(element)):
      return f"a tuple of some of {', '.join(choices)}"
    bounds = facts.get(Range) or inner.get(Range) or ""
    return f"a tuple of {_count(length)}{_plural(element)}{each}{bounds}"
  if _members(kind):
    own = [m for m in _members(kind) if _split(m)[0] in NOUNS]
    return " or ".join(describe(_with(m, facts)) for m in own) or "anything"
  return _number(kind, facts.get(Range, ""))


def _number(kind: object, bounds: Range | str) -> str:
  text = str(bounds)
  of = "of " if text.startswith("at ") else ""
  return " ".join(filter(None, (NOUNS.get(kind, "anything"), of + text)))


def arguments(function: Callable[..., Any]) -> dict[str, Field]:
  """Returns the arguments of a function, or the fields of a dataclass.

  The type of an argument without an annotation is that of its default. Their meanings
  are read from the sections Args or Attributes of the docstring.

  Args:
    function: or a dataclass.

  Example:
    >>> arguments(Length)["minimum"]
    Field(annotation=<class 'int'>, default=0, doc='number of elements.')
  """
  return dict(_arguments(inspect.unwrap(function)))


@functools.cache
def _arguments(function: Callable[..., Any]) -> Mapping[str, Field]:
  try:
    hints = typing.get_type_hints(function, include_extras=True)
  except NameError:  # a name that is imported for type checkers alone
    hints = {}
  docs = _meanings(inspect.getdoc(function) or "")
  found = {}
  for p in inspect.signature(function).parameters.values():
    if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
      continue
    default = type(p.default) if p.default not in (p.empty, None) else Any
    default = tuple[Any, ...] if default is tuple else default
    found[p.name] = Field(hints.get(p.name, default), p.default, docs.get(p.name, ""))
  return found


def check_all(values: Mapping[str, object], declared: Mapping[str, Field]) -> None:
  """Checks all values that are declared.

  Args:
    values: name -> value.
    declared: what `arguments` returned.

  Raises:
    ValueError: see `check`.
  """
  for name, value in values.items():
    if name in declared:
      check(name, value, declared[name].annotation)


def check_instance(instance: object) -> None:
  """Checks all fields of a dataclass, in its `__post_init__`.

  Args:
    instance: the dataclass.

  Raises:
    ValueError: see `check`.
  """
  check_all(vars(instance), arguments(type(instance)))


def checked(function: Function) -> Function:
  """Returns the function with a check of its arguments at every call.

  Args:
    function: with annotated arguments.

  Example:
    >>> checked(lambda *, steps=3: steps)(steps="many")
    Traceback (most recent call last):
    ...
    ValueError: steps='many': must be an integer
  """
  signature = inspect.signature(function)

  @functools.wraps(function)
  def call(*args: Any, **options: Any) -> Any:
    check_all(signature.bind(*args, **options).arguments, arguments(function))
    return function(*args, **options)

  return typing.cast(Function, call)


def _split(annotation: object) -> tuple[object, Facts]:
  """Returns the type of an annotation, and what it says besides, by type."""
  if typing.get_origin(annotation) is not Annotated:
    return annotation, {}
  kind, *facts = typing.get_args(annotation)
  inner, more = _split(kind)
  return inner, more | {type(fact): fact for fact in facts}


def _options(kind: object, facts: Facts) -> tuple[str | int, ...]:
  """Returns the only values that a field may have, () if they are not enumerated."""
  if typing.get_origin(kind) is Literal:
    return typing.get_args(kind)
  return facts[Choices].values() if Choices in facts else ()


def _choices(kind: object, facts: Facts) -> tuple[str, ...]:
  return tuple(str(option) or "''" for option in _options(kind, facts))


def _members(kind: object) -> tuple[Kind, ...]:
  union = typing.get_origin(kind) in (typing.Union, types.UnionType)
  return typing.get_args(kind) if union else ()


def _with(kind: object, facts: Facts) -> Kind:
  return Annotated[kind, *facts.values()] if facts else kind


def _tuple(kind: object, facts: Facts) -> tuple[Length, Kind]:
  """Returns number and annotation of the elements of a tuple."""
  elements = typing.get_args(kind)
  if elements[-1] is Ellipsis:
    return facts.get(Length, Length()), elements[0]
  return Length(len(elements), len(elements)), elements[0]


def _count(length: Length) -> str:
  if length.minimum == length.maximum:
    return f"{length.minimum} "
  if length.maximum < Length.maximum:
    return f"{length.minimum} to {length.maximum} "
  return "one or more " if length.minimum else ""


def _plural(element: object) -> str:
  kind, _ = _split(element)
  return PLURALS.get(kind, "values")


def _problem(value: object, annotation: object) -> str:
  """Returns what a value must be instead, "" if it fits."""
  kind, facts = _split(annotation)
  if options := _options(kind, facts):
    known = any(type(value) is type(option) and value == option for option in options)
    return "" if known else describe(annotation)
  if kind is str:
    if not isinstance(value, str | os.PathLike):
      return describe(annotation)
    return str(facts[Place]) if Place in facts and value not in facts[Place] else ""
  if kind is bool:
    return "" if isinstance(value, bool) else describe(annotation)
  if kind in (int, float):
    return _number_problem(value, kind, facts.get(Range, Range()))
  if typing.get_origin(kind) is tuple:
    length, element = _tuple(kind, facts)
    if not isinstance(value, tuple | list):
      return describe(annotation)
    if not length.minimum <= len(value) <= length.maximum:
      return describe(annotation)
    if Range in facts:
      element = _with(element, {Range: facts[Range]})
    problems = [problem for v in value if (problem := _problem(v, element))]
    return describe(annotation) if problems else ""
  if members := _members(kind):
    plain = isinstance(value, bool | int | float | str | list | None)
    plain = plain or type(value) is tuple
    own = [m for m in members if _split(m)[0] in (*NOUNS, type(None))]
    if plain and own != [type(None)]:
      problems = [_problem(value, _with(m, facts)) for m in own]
      return "" if "" in problems else problems[0]
  if kind is type(None):
    return "" if value is None else "None"
  return ""


def _number_problem(value: Any, kind: object, bounds: Range) -> str:
  is_number = isinstance(
    value, numbers.Integral if kind is int else numbers.Real
  ) and not isinstance(value, bool)
  if not is_number:
    return _number(kind, bounds)
  if value not in bounds:
    return str(bounds) or "finite"
  if kind is int and bounds.maximum is None and abs(value) > MAX_INT:
    return "below 2^31"
  if kind is float and not abs(value) <= MAX_FLOAT:
    if abs(value) != math.inf and value == value:
      return "below 3.4e38"
    return "finite" if bounds.finite else ""
  return ""


def _meanings(doc: str) -> dict[str, str]:
  """Returns the meanings of arguments in a docstring of Google's style."""
  section = re.search(r"^(?:Args|Attributes):\n((?:  .*\n?|\n)*)", doc, re.MULTILINE)
  if section is None:
    return {}
  entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section[1], re.MULTILINE)
  return {name: " ".join(text.split()) for name, text in entries}
