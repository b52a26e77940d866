"""JSON files that are read with bounds, against a schema, and with clear errors.

A file may have been edited, cut, or replaced by something else. Whatever it holds, the
reader returns a value of the declared form or raises one `UserError`: the path, the
field, its value, what is allowed, and the remedy. Before a file is parsed, its kind
(regular files only), its size and the depth of its nesting are checked.

A schema is a type: a `TypedDict`, `dict[str, float]`, `list[Row]`, a union, a literal;
bounds are `Annotated[int, msgspec.Meta(ge=1)]`. A schema stands beside the function that
writes the file.
"""

import functools
import itertools
import json
import math
import os
import re
import reprlib
from typing import Annotated, Any, TypeVar

import msgspec
import msgspec.inspect

from sdiff_jax.io import file_io
from sdiff_jax.types import Json, UserError

Path = str | os.PathLike[str]
T = TypeVar("T")

MAX_BYTES = file_io.MAX_BYTES
MAX_LINES_BYTES = 256 << 20  # of files of JSON lines
MAX_DEPTH = 64
BLOCK = 1000  # number of lines of JSON that are decoded together
MAX_QUOTED = 60  # characters of a value in a message
INT_BITS = 64

Count = Annotated[int, msgspec.Meta(ge=0)]  # 0, 1, 2, ...
Positive = Annotated[int, msgspec.Meta(ge=1)]  # 1, 2, 3, ...
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e10)]  # at most 300 years
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]

_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_EXPECTED = re.compile(r"Expected `(.*?)`(.*?)(?:, got .*)?")
_WORDS = {  # of msgspec
  "int": "an integer",
  "float": "a number",
  "str": "a text",
  "bool": "true or false",
  "array": "a list",
  "object": "an object",
}


def read(
  path: Path,
  schema: type[T],
  remedy: str = "",
  *,
  max_bytes: int = MAX_BYTES,
  max_depth: int = MAX_DEPTH,
  any_number: bool = False,
) -> T:
  """Returns the value of a JSON file that has the form of a schema.

  The value is returned as the file has it: no field is added, dropped or converted.

  Args:
    path: the file.
    schema: the type that the value must have.
    remedy: what to do if the file is missing or damaged; the end of the message.
    max_bytes: largest size of the file.
    max_depth: largest depth of nested lists and objects.
    any_number: read NaN, Infinity and integers of up to 128 bits, which other projects
      write; otherwise they are refused.

  Raises:
    UserError: the file is missing, is not a regular file, is too large, is not JSON in
      UTF-8, or does not have the form of the schema; the message starts with the path.

  Example:
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "a.json")
    >>> path.write_text('{"steps": 3}')
    12
    >>> read(path, dict[str, Count])
    {'steps': 3}
  """
  content = file_io.read_bytes(path, remedy, max_bytes)
  options = {"max_depth": max_depth, "any_number": any_number}
  return decode(content, schema, str(path), remedy, **options)


def read_json(
  path: Path,
  remedy: str = "",
  *,
  max_bytes: int = MAX_BYTES,
  max_depth: int = MAX_DEPTH,
  any_number: bool = False,
) -> Json:
  """Returns the value of a JSON file of any form; otherwise it is the same as `read`."""
  bounds = {"max_bytes": max_bytes, "max_depth": max_depth}
  return read(path, Any, remedy, **bounds, any_number=any_number)


def read_lines(
  path: Path, schema: type[T], remedy: str = "", *, max_bytes: int = MAX_LINES_BYTES
) -> list[T]:
  """Returns the values of a file of JSON lines.

  An incomplete last line, which a process that was killed may leave, is left out.

  Args:
    path: the file.
    schema: the type that every value must have.
    remedy: what to do if the file is missing or damaged; the end of the message.
    max_bytes: largest size of the file.

  Raises:
    UserError: as in `read`; the message names the line.
  """
  content = file_io.read_bytes(path, remedy, max_bytes)
  *lines, last = content.split(b"\n")
  values: list[T] = []
  for start in range(0, len(lines), BLOCK):
    block = lines[start : start + BLOCK]
    values += _decode_block(block, schema, path, remedy, start + 1)
  try:
    return [*values, decode(last, schema, str(path))]
  except UserError:
    return values


def _decode_block(
  lines: list[bytes], schema: type[T], path: Path, remedy: str, first: int
) -> list[T]:
  """Returns the values of some lines of JSON, of which the first has a number.

  The lines are decoded together, which takes a fraction of the time, and one by one if
  that fails, so that the message names the line.
  """
  full = [line for line in lines if line.strip()]
  try:
    content = b"[" + b",".join(full) + b"]"
    values = decode(content, list[schema], "", max_depth=MAX_DEPTH + 1)  # type: ignore[valid-type]
    if len(values) == len(full):
      return values
  except UserError:
    pass
  return [
    decode(line, schema, f"{path}: line {number}", remedy)
    for number, line in enumerate(lines, first)
    if line.strip()
  ]


def decode(
  content: bytes | str,
  schema: type[T],
  source: str,
  remedy: str = "",
  *,
  max_depth: int = MAX_DEPTH,
  any_number: bool = False,
) -> T:
  """Returns the value of a JSON text, as `read` does.

  Args:
    content: the text; bytes are UTF-8.
    schema: the type that the value must have.
    source: where the text comes from; the start of the message.
    remedy: the end of the message.
    max_depth: largest depth of nested lists and objects.
    any_number: read NaN, Infinity and integers of up to 128 bits, which other projects
      write; otherwise they are refused.

  Raises:
    UserError: the text is not JSON, or does not have the form of the schema.

  Example:
    >>> decode('{"steps": "x"}', dict[str, int], "a.json", "train again")
    Traceback (most recent call last):
    ...
    sdiff_jax.types.UserError: a.json: steps is 'x': it must be an integer; train again
  """
  try:
    encoded = content.encode("utf-8") if isinstance(content, str) else content
    text = encoded.decode("utf-8")
    if _depth(encoded) > max_depth:
      raise ValueError(f"its nesting is deeper than {max_depth} levels")
    value = (_DECODER_OF_ANY_NUMBER if any_number else _DECODER).decode(text)
  except ValueError as error:
    reason = shortened(str(error), 120)
    raise UserError(f"{source} is not valid JSON ({reason}){_end(remedy)}") from None
  return check(value, schema, source, remedy)


def check(value: Json, schema: type[T], source: str, remedy: str = "") -> T:
  """Returns a value of JSON if it has the form of a schema.

  Args:
    value: of dicts, lists, strings, numbers, booleans and None.
    schema: the type that it must have.
    source: where the value comes from; the start of the message.
    remedy: the end of the message.

  Raises:
    UserError: the value does not have the form of the schema; the message names the
      field, its value, and what is allowed.

  Example:
    >>> check({"a": [1, None]}, dict[str, list[int]], "a.json")
    Traceback (most recent call last):
    ...
    sdiff_jax.types.UserError: a.json: a[1] is null: it must be an integer
  """
  try:
    msgspec.convert(value, schema)
  except msgspec.ValidationError as error:
    message = _message(value, schema, str(error))
    raise UserError(f"{source}: {message}{_end(remedy)}") from None
  return value


def quoted(value: Json) -> str:
  """Returns a value as a message shows it: at most 60 characters.

  Args:
    value: any value of JSON.

  Example:
    >>> quoted(None), quoted(True), quoted("a" * 100)
    ('null', 'true', "'aaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaa'")
  """
  if value is None or isinstance(value, bool):
    return json.dumps(value)
  return shortened(_REPR.repr(value), MAX_QUOTED)


def shortened(text: str, length: int) -> str:
  """Returns a text of at most `length` characters; the middle of a longer one is "...".

  Args:
    text: any text.
    length: largest number of characters, at least 5.

  Example:
    >>> shortened("abcdefghij", 7)
    'ab...ij'
  """
  if len(text) <= length:
    return text
  side = (length - 3) // 2
  return f"{text[:side]}...{text[-side:]}"


def _end(remedy: str) -> str:
  return f"; {remedy}" if remedy else ""


def _depth(content: bytes) -> int:
  """Returns the depth of nested lists and objects of a JSON text."""
  brackets = _STRINGS.sub(b"", content).translate(None, _NO_BRACKETS)
  return max(itertools.accumulate(map(_STEPS.__getitem__, brackets)), default=0)


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
  """Returns the dict of a JSON object, whose keys must be distinct."""
  value = dict(pairs)
  if len(value) < len(pairs):
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise ValueError(f"the key {quoted(twice)} appears twice")
  return value


def _integer(text: str, bits: int = INT_BITS) -> int:
  """Returns an integer, which must fit into some bits."""
  if len(text) > bits or (value := int(text)).bit_length() > bits:
    raise ValueError(f"the integer {shortened(text, 30)} is out of range")
  return value


def _number(text: str) -> float:
  """Returns a number, which must be finite."""
  value = float(text)
  if not math.isfinite(value):
    raise ValueError(f"the number {shortened(text, 30)} is out of range")
  return value


def _constant(text: str) -> float:
  raise ValueError(f"{text} is no number")


_DECODER = json.JSONDecoder(
  object_pairs_hook=_object,
  parse_int=_integer,
  parse_float=_number,
  parse_constant=_constant,
)
_DECODER_OF_ANY_NUMBER = json.JSONDecoder(
  object_pairs_hook=_object,
  parse_int=functools.partial(_integer, bits=2 * INT_BITS),
)
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = MAX_QUOTED - 5
_REPR.maxlevel = 2


def _message(value: Json, schema: type, error: str) -> str:
  """Returns "FIELD is VALUE: it must be ..." for the message of a ValidationError."""
  reason, _, path = error.partition(" - at `$")
  steps, at = _locate(value, schema, path.rstrip("`"))
  field = ""
  for step in steps:
    field = f"{field}[{step}]" if isinstance(step, int) else _join(field, step)
  if "`" in reason and "required field" in reason:
    return f"{_join(field, reason.split('`')[1])} is missing"
  expected = _EXPECTED.fullmatch(reason)
  if reason.startswith("Invalid enum value"):
    choices = _choices(msgspec.inspect.type_info(schema), steps)
    allowed = f"it must be {' or '.join(map(repr, choices))}"
  elif expected is None:
    allowed = reason[0].lower() + reason[1:]
  else:
    names = [_WORDS.get(name, name) for name in expected[1].split(" | ")]
    allowed = f"it must be {' or '.join(names)}{expected[2]}"
  return f"{field or 'the content'} is {quoted(at)}: {allowed}"


def _choices(info: msgspec.inspect.Type, steps: list[str | int]) -> list[str | int]:
  """Returns the values of the literal types at some steps below a type."""
  if isinstance(info, msgspec.inspect.UnionType):
    return [choice for member in info.types for choice in _choices(member, steps)]
  if not steps:
    return [*info.values] if isinstance(info, msgspec.inspect.LiteralType) else []
  step, *others = steps
  match info:
    case msgspec.inspect.TypedDictType(fields=fields):
      members = [field.type for field in fields if field.name == step]
    case msgspec.inspect.DictType(value_type=member):
      members = [member]
    case msgspec.inspect.ListType(item_type=member):
      members = [member]
    case _:
      members = []
  return [choice for member in members for choice in _choices(member, others)]


def _locate(value: Json, schema: type, path: str) -> tuple[list[str | int], Json]:
  """Returns the keys that lead to the field at a path of msgspec, and its value.

  msgspec writes "[...]" for a key of a dict; the key is that whose value alone is
  refused.

  Args:
    value: the whole value.
    schema: of the value.
    path: such as ".data.sizes[...][3]".
  """
  at, steps = value, list[str | int]()
  for token in re.findall(r"\[\.\.\.\]|\[\d+\]|\.[^.\[]+", path):
    if token == "[...]":
      keys = (k for k in at if _refused(_only(value, steps, k), schema))
      key: str | int = next(keys, next(iter(at)))
    else:
      key = token[1:] if token[0] == "." else int(token[1:-1])
    steps.append(key)
    at = at[key]
  return steps, at


def _only(value: Json, steps: list[str | int], key: str) -> Json:
  """Returns a value in which the dict at some steps has one key alone."""
  if not steps:
    return {key: value[key]}
  first, *others = steps
  copied = value.copy()
  copied[first] = _only(value[first], others, key)
  return copied


def _refused(value: Json, schema: type) -> bool:
  try:
    msgspec.convert(value, schema)
  except msgspec.ValidationError:
    return True
  return False


def _join(name: str, key: str) -> str:
  key = shortened(key, MAX_QUOTED)
  return f"{name}.{key}" if name else key
