"""The config.json of a work directory: its schema, and how it is read.

The fields are those of the defaults and of the components that the config names, so the
schema is derived from them: each value has the type of the default.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import NotRequired, Required, TypedDict

import ml_collections

from sdiff_jax import config as configs
from sdiff_jax import losses, registry, renamed
from sdiff_jax.io import records, storage
from sdiff_jax.types import Json, UserError

CONFIG = "config.json"  # in a work directory
REMEDY = "restore the file, or train again with another --workdir"
# Fields of every version; others get their defaults where a file lacks them.
REQUIRED = ("data", "ema", "loss", "model", "optim", "sample", "sampler", "train")
REQUIRED += ("seed", "sigma_d")


class _Piece(TypedDict):
  name: records.Name


class _Pieces(TypedDict):
  data: _Piece
  model: _Piece
  loss: _Piece
  plugins: NotRequired[list[records.Name]]


def read(workdir: str) -> ml_collections.ConfigDict:
  """Returns the config that a work directory was trained with.

  Fields that the stored config lacks get their defaults, and fields that were renamed
  their present names.

  Args:
    workdir: of the run.

  Raises:
    UserError: there is no config, or it is damaged; the message starts with its path.
  """
  path = os.path.join(workdir, CONFIG)
  if not storage.lexists(path):
    raise UserError(f"{path} does not exist: train into {workdir} first (--job=train)")
  stored = records.read(path, _Pieces, REMEDY)
  with _errors_of(path):
    config = configs.base(tuple(stored.get("plugins", ())))
    sections = {k: dict for k, v in config.items() if _is_section(v)}
    records.check(stored, TypedDict("Sections", sections, total=False), path, REMEDY)
    stored = renamed.with_new_names(stored)
    for section, kind in configs.PIECES.items():
      if name := stored.get(section, {}).get("name"):
        records.check(stored[section], _Piece, f"{path}: {section}", REMEDY)
        fields = registry.fields(kind, name)
        config[section] = ml_collections.ConfigDict({"name": name} | fields)
    records.check(stored, _schema(config.to_dict(), REQUIRED), path, REMEDY)
    config.update(_with_tuples(stored))
    configs.validate(config)
    if config.job not in registry.names("jobs"):
      raise UserError(f"job is {records.quoted(config.job)}: there is no such job")
    needs_teacher = _needs_teacher(config)
  if "init_from" not in stored:  # the teacher was also what the network started from
    config.init_from = config.teacher.workdir
    if not needs_teacher:
      config.teacher.workdir = ""
  return config


def plugins(workdir: str) -> tuple[str, ...]:
  """Returns the plugins of a stored config, () if it has none or is damaged.

  Args:
    workdir: of the run.

  Example:
    >>> plugins("nothing/here")
    ()
  """
  try:
    stored = records.read(os.path.join(workdir, CONFIG), _Pieces)
  except UserError:
    return ()
  return tuple(stored.get("plugins", ()))


def _needs_teacher(config: ml_collections.ConfigDict) -> bool:
  """Returns whether the loss of a config needs a teacher.

  Raises:
    UserError: the loss does not know the value of one of its fields.
  """
  try:
    return losses.facts(config.loss).needs_teacher
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f"config.loss: the loss {config.loss.name!r} does not know {error}"
    ) from error


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
  """Puts the path of a stored config before the messages of mistakes in it."""
  try:
    yield
  except UserError as error:
    message = str(error)
    if message.startswith(path):
      raise
    raise UserError(f"{path}: {message.removeprefix('config.')}; {REMEDY}") from error


def _is_section(value: Json) -> bool:
  return isinstance(value, Mapping | ml_collections.ConfigDict)


def _schema(defaults: Mapping[str, Json], required: tuple[str, ...] = ()) -> type:
  """Returns the schema of a section whose values have the types of the defaults."""
  fields = {name: _type_of(value) for name, value in defaults.items()}
  fields |= {name: Required[fields[name]] for name in required}
  return TypedDict("Section", fields, total=False)


def _type_of(default: Json) -> type:
  """Returns the type that a value in JSON has if its default is `default`."""
  if isinstance(default, Mapping):
    return _schema(default)
  if isinstance(default, tuple | list):
    types = {_type_of(entry) for entry in default}
    return list[types.pop()] if len(types) == 1 else list
  return type(default)


def _with_tuples(value: Json) -> Json:
  """Returns a value read from JSON with tuples instead of lists."""
  if isinstance(value, dict):
    return {k: _with_tuples(v) for k, v in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
