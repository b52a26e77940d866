"""JSON files: bounds, schemas, messages; a fuzz of short mutations."""

import json
import os
import random
import socket
import string
import time
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pytest

from sdiff_jax.io import file_io, records
from sdiff_jax.types import MAX_MESSAGE, UserError


class Part(TypedDict, total=False):
  size: records.Positive
  names: list[str]


class Example(TypedDict):
  steps: records.Count
  loss: float | None
  kind: Literal["model", "baseline"]
  parts: dict[str, Part]
  pair: Annotated[list[int], msgspec.Meta(min_length=2, max_length=2)]


VALUE = {
  "steps": 3,
  "loss": 0.5,
  "kind": "model",
  "parts": {"a": {"size": 1}, "b.c": {"size": 2, "names": ["x", "y"]}},
  "pair": [1, 2],
  "more": {"kept": True},
}


def error(value, schema=Example, remedy="train again"):
  with pytest.raises(UserError) as caught:
    records.check(value, schema, "a.json", remedy)
  return str(caught.value)


def test_a_value_is_returned_as_the_file_has_it(tmp_path):
  path = tmp_path / "a.json"
  path.write_text(json.dumps(VALUE))
  assert records.read(path, Example) == VALUE == records.read_json(path)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"steps": "x"}, "steps is 'x': it must be an integer"),
    ({"steps": 1.0}, "steps is 1.0: it must be an integer"),
    ({"steps": True}, "steps is true: it must be an integer"),
    ({"steps": -1}, "steps is -1: it must be an integer >= 0"),
    ({"loss": []}, "loss is []: it must be a number or null"),
    ({"kind": "other"}, "kind is 'other': it must be 'baseline' or 'model'"),
    ({"kind": 3}, "kind is 3: it must be a text"),
    ({"parts": None}, "parts is null: it must be an object"),
    ({"parts": {"a": {}, "q": 4}}, "parts.q is 4: it must be an object"),
    ({"parts": {"a": {"size": 0}}}, "parts.a.size is 0: it must be an integer >= 1"),
    (
      {"parts": {"a": {"names": ["x"]}, "b.c": {"names": ["x", None]}}},
      "parts.b.c.names[1] is null: it must be a text",
    ),
    ({"pair": [1]}, "pair is [1]: it must be a list of length >= 2"),
  ],
)
def test_a_message_names_field_value_and_what_is_allowed(changed, message):
  assert error(VALUE | changed) == f"a.json: {message}; train again"


def test_a_missing_field_and_a_value_of_another_kind():
  without = {k: v for k, v in VALUE.items() if k != "loss"}
  assert error(without) == "a.json: loss is missing; train again"
  for value, text in ([], "[]"), (None, "null"), ("x", "'x'"), (3, "3"):
    assert (
      error(value, remedy="") == f"a.json: the content is {text}: it must be an object"
    )


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (b"", "Expecting value"),
    (b'{"a": 1', "Expecting ',' delimiter"),
    (b"\xff\xfe{}", "utf-8"),
    (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' appears twice"),
    (b"[" * 100_000, "deeper than 64"),
    (b'{"a":' * 70 + b"1" + b"}" * 70, "deeper than 64"),
    (b'{"a": NaN}', "NaN is no number"),
    (b'{"a": [1, -Infinity]}', "-Infinity is no number"),
    (b"1e999", "the number 1e999 is out of range"),
    (b"9" * 5000, "is out of range"),
    (b"123456789012345678901", "is out of range"),
    (b'"\x00"', "control character"),
  ],
)
def test_a_text_that_is_not_json_is_refused(tmp_path, content, reason):
  path = tmp_path / "a.json"
  path.write_bytes(content)
  with pytest.raises(UserError) as caught:
    records.read_json(path, "train again")
  message = str(caught.value)
  assert message.startswith(f"{path} is not valid JSON (")
  assert reason in message
  assert message.endswith("; train again")
  assert len(message) < 500


def test_what_python_writes_for_nan_is_null_if_that_is_asked_for(tmp_path):
  path, value = tmp_path / "a.json", {"a": [1.0, float("nan"), (float("-inf"),)]}
  path.write_text(json.dumps(value))
  read = records.read_json(path, any_number=True)
  assert file_io.without_nan(read) == {"a": [1.0, None, [None]]}
  file_io.write_json(path, value)
  assert records.read_json(path) == {"a": [1.0, None, [None]]}


def test_brackets_inside_of_texts_are_not_nesting():
  value = {"a": "[" * 500 + '"\\', "b": ["\\", "{" * 500]}
  assert records.decode(json.dumps(value), Any, "a") == value


def test_only_regular_files_of_bounded_size_are_opened(tmp_path):
  pipe, link, loop, full = (tmp_path / name for name in ("p", "l", "o", "f"))
  os.mkfifo(pipe)
  link.symlink_to(pipe)
  loop.symlink_to(loop)
  full.write_bytes(b"1" * 101)
  server = socket.socket(socket.AF_UNIX)
  server.bind(str(tmp_path / "s"))
  expected = {
    pipe: "is a named pipe, not a regular file",
    link: "is a named pipe, not a regular file",
    tmp_path: "is a directory, not a regular file",
    tmp_path / "s": "is a socket, not a regular file",
    "/dev/zero": "is a device, not a regular file",
    tmp_path / "nothing": "does not exist",
    full / "below": "does not exist",
    loop: "Too many levels of symbolic links",
    tmp_path / ("a" * 300): "File name too long",
    full: "has 101 bytes: at most 100 are read",
    "a\0b": "null",
  }
  for path, reason in expected.items():
    for read in records.read_json, file_io.read_bytes:
      with pytest.raises(UserError, match=f".*{reason}.*; help") as caught:
        read(path, "help", max_bytes=100)
      assert str(caught.value).startswith(str(path))
  server.close()


def test_json_lines_tolerate_only_an_incomplete_last_line(tmp_path):
  path, schema = tmp_path / "a.jsonl", dict[str, int]
  for content in (
    '{"a": 1}\n{"a": 2}\n',
    '{"a": 1}\n\n{"a": 2}',
    '{"a": 1}\n{"a": 2}\n{"a',
  ):
    path.write_text(content)
    assert records.read_lines(path, schema) == [{"a": 1}, {"a": 2}]
  path.write_text('{"a": 1}\n{"a": "x"}\n')
  with pytest.raises(UserError, match="line 2: a is 'x': it must be an integer; q"):
    records.read_lines(path, schema, "q")
  path.write_text('{"a": 1}\n{"a\n{"a": 2}\n')
  with pytest.raises(UserError, match="line 2 is not valid JSON"):
    records.read_lines(path, schema)


def test_quoted_values_and_messages_are_short():
  deep: Any = 1
  for _ in range(60):
    deep = {"a": [deep] * 2}
  for value in "x" * 10**6, [[0] * 10**5] * 9, deep, {"k" * 999: 1}, 10**60, "a\nb\x1b":
    assert len(text := records.quoted(value)) <= records.MAX_QUOTED
    assert text.isprintable()
  assert len(error({"k" * 10**5: 1}, dict[str, str])) < MAX_MESSAGE
  assert len(error(VALUE | {"steps": "x" * 10**5})) < MAX_MESSAGE
  message = str(UserError("path: " + "x" * 10_000 + "\nremedy"))
  assert len(message) <= MAX_MESSAGE
  assert message.startswith("path: ")
  assert message.endswith("x remedy")


def mutated(content, rng):
  """Returns a JSON text with one mutation: cut, flip, retype, deepen, enlarge."""
  kind = rng.randrange(5)
  i = rng.randrange(len(content))
  if kind == 0:
    return content[:i]
  if kind == 1:
    return content[:i] + bytes([content[i] ^ 1 << rng.randrange(8)]) + content[i + 1 :]
  value = json.loads(content)
  at, key = value, rng.choice([*value])
  while isinstance(at[key], dict | list) and at[key] and rng.random() < 0.7:
    at = at[key]
    key = rng.choice([*at]) if isinstance(at, dict) else rng.randrange(len(at))
  if kind == 2:
    at[key] = rng.choice([None, True, -1, 1.5, "x", [], {}, 10**30, [[]], "1"])
  elif kind == 3:
    for _ in range(rng.choice([3, 100, 900])):
      at[key] = [at[key]]
  else:
    at[key] = rng.choice(string.printable) * rng.choice([10, 10_000])
  return json.dumps(value).encode()


def test_every_mutation_ends_in_a_value_or_in_one_line():
  rng = random.Random(0)
  content, start = json.dumps(VALUE).encode(), time.monotonic()
  refused = 0
  for _ in range(3000):
    try:
      value = records.decode(mutated(content, rng), Example, "a.json", "help")
      records.check(value, Example, "a.json")
    except UserError as caught:
      message = str(caught)
      assert message.startswith("a.json")
      assert message.endswith("; help")
      assert len(message) < 500
      assert "\n" not in message
      refused += 1
  assert 1000 < refused < 3000
  assert time.monotonic() - start < 60
