"""Configs of work directories: what was written is read, what was edited is refused."""

import copy
import json
import pathlib
import random

import pytest

from sdiff_jax import config
from sdiff_jax.experiment import stored_config
from sdiff_jax.io import file_io
from sdiff_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[2]
OLD = json.loads((ROOT / "tests" / "fixtures" / "old_config.json").read_text())
GONE = object()


def edited(*changes):
  """Returns the config with some fields, by their names with dots, changed."""
  value = copy.deepcopy(OLD)
  for name, new in changes:
    *sections, field = name.split(".")
    at = value
    for section in sections:
      at = at[section]
    if new is GONE:
      del at[field]
    else:
      at[field] = new
  return value


def refusal(folder, content):
  path = folder / "config.json"
  path.write_bytes(
    content if isinstance(content, bytes) else json.dumps(content).encode()
  )
  with pytest.raises(UserError) as caught:
    stored_config.read(str(folder))
  message = str(caught.value)
  assert message.startswith(str(path))
  assert message.endswith("restore the file, or train again with another --workdir")
  assert len(message) < 500
  return message.removeprefix(f"{path}").rpartition("; restore")[0]


@pytest.mark.parametrize(
  "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem
)
def test_every_config_is_read_as_it_was_written(path, tmp_path):
  written = config.load(str(path))
  config.complete(written)
  file_io.write_json(tmp_path / "config.json", written.to_dict())
  assert stored_config.read(str(tmp_path)).to_dict() == written.to_dict()


TYPES = [
  ("model.depth", "x", "it must be an integer"),
  ("model.depth", None, "it must be an integer"),
  ("model.depth", 1.5, "it must be an integer"),
  ("train.steps", True, "it must be an integer"),
  ("train.flip", 1, "it must be true or false"),
  ("loss.p_mean", [], "it must be a number"),
  ("sigma_d", None, "it must be a number"),
  ("data.mean", [[0.0]], "it must be a number"),
  ("data.mean", 0.0, "it must be a list"),
  ("ema.profiles", "power", "it must be a list"),
  ("ema.profiles", [1], "it must be a text"),
  ("job", [], "it must be a text"),
  ("model", 3, "it must be an object"),
  ("data", None, "it must be an object"),
  ("reference", [], "it must be an object"),
  ("reference.name", [], "it must be a text"),
  ("teacher", 3, "it must be an object"),
  ("teacher.workdir", 3, "it must be a text"),
  ("mesh", "x", "it must be an object"),
  ("plugins", "json", "it must be a list"),
  ("plugins", [{}], "it must be a text"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), TYPES)
def test_a_field_of_another_type_is_named(name, value, allowed, tmp_path):
  message = refusal(tmp_path, edited((name, value)))
  assert message.startswith(f": {name}")
  assert message.endswith(allowed)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ([("data.name", GONE)], "data.name is missing"),
    ([("data.name", "digits.x")], "data: no 'digits.x'"),
    ([("data.name", "..")], "data: no '..'"),
    ([("model.name", "")], "model.name is ''"),
    ([("loss", GONE)], "loss is missing"),
    ([("train", GONE)], "train is missing"),
    ([("job", "nothing")], "job is 'nothing': there is no such job"),
    ([("unknown", {"a": 1})], "unknown.a: there is no such field"),
    ([("unknown", 1)], "unknown: there is no such field"),
    ([("train.unknown", 1)], "train.unknown: there is no such field"),
    ([("model.unknown", 1)], "model.unknown: "),
    ([("train.batch_size", 0)], "train.batch_size=0: "),
    ([("plugins", ["no_such_module"])], "plugins='no_such_module': "),
    ([("data.name", "x" * 100_000)], "data.name is 'xxx"),
  ],
)
def test_what_is_missing_or_unknown_is_named(changes, message, tmp_path):
  assert refusal(tmp_path, edited(*changes)).startswith(f": {message}")


@pytest.mark.parametrize(
  "content",
  [b"", b"{", b"\xff\xfe{", b"[" * 10**5, b"null", b"[]", b"3", b"{}", b'{"a": NaN}'],
)
def test_a_file_that_is_no_config_is_refused(content, tmp_path):
  refusal(tmp_path, content)


def test_plugins_of_a_damaged_file_are_none(tmp_path):
  assert stored_config.plugins(str(tmp_path)) == ()
  for content, names in (
    (b"[", ()),
    (json.dumps(edited(("plugins", ["json"]))), ("json",)),
  ):
    file_io.write_bytes(
      tmp_path / "config.json",
      content if isinstance(content, bytes) else content.encode(),
    )
    assert stored_config.plugins(str(tmp_path)) == names


VALUES = (
  None,
  True,
  -1,
  0,
  1.5,
  1e300,
  "x",
  "",
  [],
  [1],
  {},
  {"name": "digits"},
  2**63,
)


def outcome(folder):
  try:
    stored_config.read(str(folder))
  except UserError as error:
    return str(error)
  return ""


def test_every_mutation_is_read_or_refused_in_one_line(tmp_path):
  rng, path, refused = random.Random(0), tmp_path / "config.json", 0
  for _ in range(400):
    value = copy.deepcopy(OLD)
    for _ in range(rng.choice([1, 1, 2])):
      at = value
      while isinstance(inner := at[rng.choice([*at])], dict) and inner:
        at = inner
        if rng.random() < 0.5:
          break
      key = rng.choice([*at])
      if rng.random() < 0.2:
        del at[key]
      else:
        at[key] = rng.choice(VALUES)
      if not at:
        break
    content = json.dumps(value).encode()
    if rng.random() < 0.2:
      k = rng.randrange(len(content))
      content = (
        content[:k] + bytes([content[k] ^ 1 << rng.randrange(8)]) + content[k + 1 :]
      )
    path.write_bytes(content)
    message = outcome(tmp_path)
    assert message.startswith(str(path)) or not message
    assert len(message) < 500
    refused += bool(message)
  assert 100 < refused < 400
