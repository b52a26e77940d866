"""Config files of other projects: types, ranges and sizes of fields."""

import json
import types
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from sdiff_jax.io import file_io, records
from sdiff_jax.types import Json, UserError

MAX_NAMES = 6  # fields of each kind in a message
MAX_QUOTED = 60  # characters of a value in a message

Type = Any  # of a value, as msgspec takes it, which no type of Python describes


class Field(NamedTuple):
  """A field of a config file.

  Attributes:
    default: its value where the file has none.
    type: of its values, as msgspec has it: `Annotated[int, Meta(ge=1)] | None`.
  """

  default: Json
  type: Type


Fields = Mapping[str, Field]
Channels = Annotated[int, Meta(ge=1, le=65_536)]
Layers = Annotated[int, Meta(ge=1, le=64)]  # of one level of a network
Positive = Annotated[float, Meta(gt=0, le=1e6)]
Fraction = Annotated[float, Meta(gt=0, lt=1)]
MAX_LEVELS = 16
ChannelsOfLevels = Annotated[list[Channels], Meta(min_length=1, max_length=MAX_LEVELS)]
LayersOfLevels = Annotated[list[Layers], Meta(min_length=1, max_length=MAX_LEVELS)]
Names = Annotated[list[str], Meta(min_length=1, max_length=MAX_LEVELS)]


def read_config(path: str) -> dict[str, Json]:
  """Returns the fields of a config file, which may hold numbers that JSON does not have.

  diffusers writes -Infinity, and transformers integers of 100 bits, for "no limit".

  Args:
    path: of the file.

  Raises:
    UserError: the file is missing or damaged, or holds something else.
  """
  config = records.read_json(path, any_number=True)
  if not isinstance(config, dict):
    raise UserError(f"{path} is damaged: not a dict, but {quoted(config)}")
  return config


def write_config(path: str, config: Mapping[str, Json]) -> None:
  """Writes a config file that `read_config` and the other projects read as it was.

  Unlike `file_io.write_json`, it keeps -Infinity, Infinity and NaN, as Python's JSON has
  them.

  Args:
    path: of the file.
    config: its fields.
  """
  file_io.write_text(path, json.dumps(config, indent=2) + "\n")


def validated_config(
  config: dict[str, Json],
  fields: Fields,
  supported: Mapping[str, Container],
  ignored: Container[str] = (),
  required: Sequence[str] = (),
) -> dict[str, Json]:
  """Returns the known fields of a config, filled in with their defaults.

  Args:
    config: of a config.json; names with a leading underscore are metadata.
    fields: fields with any value of a type.
    supported: fields with only some supported values -> these values.
    ignored: fields that are not used.
    required: fields that must be there.

  Raises:
    ValueError: lists all unknown fields, all values that are not supported, and all
      values of another type or out of range with what is allowed.

  Example:
    >>> fields = {"width": Field(4, Channels)}
    >>> validated_config({"act": "gelu"}, fields, {"act": ("gelu",)})
    {'width': 4}
    >>> validated_config({"width": 0}, fields, {})
    Traceback (most recent call last):
    ...
    ValueError: width=0: must be an integer from 1 to 65536
  """
  rest = {k: v for k, v in config.items() if k not in fields and k not in ignored}
  rest = {k: v for k, v in rest.items() if not k.startswith("_")}
  unknown = sorted(quoted(k, str) for k in rest if k not in supported)
  unsupported = sorted(
    f"{k}={quoted(v)}"
    for k, v in rest.items()
    if k in supported and v not in supported[k]
  )
  wrong = [
    f"{name}={quoted(config.get(name))}: must be {allowed(field.type)}"
    for name, field in fields.items()
    if (name in config or name in required) and not _fits(config.get(name), field.type)
  ]
  listed = _abbreviated(wrong)
  for kind, names in (
    ("unknown fields", unknown),
    ("values not supported", unsupported),
  ):
    if names:
      listed.append(f"{kind}: {', '.join(_abbreviated(names))}")
  if listed:
    raise ValueError("; ".join(listed))
  return {name: config.get(name, field.default) for name, field in fields.items()}


def _fits(value: Json, type_: Type) -> bool:
  try:
    msgspec.convert(value, type_)
  except (msgspec.ValidationError, RecursionError):
    return False
  return True


def _abbreviated(texts: list[str]) -> list[str]:
  """Returns the first few texts, and how many more there are."""
  more = len(texts) - MAX_NAMES
  return texts[:MAX_NAMES] + ([f"and {more} more"] if more > 0 else [])


def quoted(
  value: Json, text: Callable[[Json], str] = repr, limit: int = MAX_QUOTED
) -> str:
  """Returns a value as the text of a message, cut if it is long.

  Args:
    value: what a file holds.
    text: value -> its whole text.
    limit: largest number of characters.

  Example:
    >>> quoted("a" * 1000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
  """
  try:
    whole = text(value)
  except (RecursionError, ValueError):  # an integer of too many digits
    return f"a {type(value).__name__}"
  return whole if len(whole) <= limit else f"{whole[: limit - 3]}..."


def allowed(type_: Type) -> str:
  """Returns what values of a type are, in words.

  Args:
    type_: see `Field`.

  Example:
    >>> allowed(Channels | None)
    'an integer from 1 to 65536, or null'
    >>> allowed(Annotated[list[Fraction], Meta(min_length=1)])
    'a list of at least 1, each a number above 0 and below 1'
  """
  origin, arguments = typing.get_origin(type_), typing.get_args(type_)
  if origin in (typing.Union, types.UnionType):
    *first, last = (allowed(t) for t in arguments)
    return f"{', '.join(first)}, or {last}"
  if origin is Literal:
    return f"one of {', '.join(map(str, arguments))}"
  if origin is Annotated:
    return _bounded(arguments[0], arguments[1])
  if origin is list:
    return f"a list, each {allowed(arguments[0])}"
  names = {int: "an integer", float: "a finite number", bool: "true or false"}
  names |= {str: "a text", type(None): "null", dict: "a mapping"}
  return names[type_]


def _bounded(type_: Type, bounds: Meta) -> str:
  """Returns what values of a type within bounds are, in words."""
  if typing.get_origin(type_) is list:
    (inner,) = typing.get_args(type_)
    least, most = bounds.min_length, bounds.max_length
    count = f"of {least} to {most}" if most is not None else f"of at least {least}"
    return f"a list {count}, each {allowed(inner)}"
  name = {int: "an integer", float: "a number", str: "a text"}[type_]
  if type_ is str:
    return f"{name} of 1 to {bounds.max_length} characters"
  if bounds.ge is not None and bounds.le is not None:
    return f"{name} from {bounds.ge} to {bounds.le}"
  words = {"above": bounds.gt, "at least": bounds.ge}
  words |= {"below": bounds.lt, "at most": bounds.le}
  return f"{name} " + " and ".join(
    f"{k} {v}" for k, v in words.items() if v is not None
  )


def each(value: Json, count: int, field: str) -> tuple:
  """Returns one value for each of `count` levels.

  Args:
    value: a list of them, or one value for all levels.
    count: number of levels.
    field: name of the config field.

  Raises:
    ValueError: a list of another length.

  Example:
    >>> each(8, 3, "attention_head_dim")
    (8, 8, 8)
  """
  values = tuple(value) if isinstance(value, list | tuple) else (value,) * count
  if len(values) != count:
    raise ValueError(
      f"{field}={quoted(value)}: must have {count} values, one for each level"
    )
  return values
