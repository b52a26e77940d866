"""Reads the files of a run, and collects the errors of those that are damaged."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple, NotRequired, TypedDict, TypeVar

from sdiff_jax import losses, registry
from sdiff_jax.io import file_io, records, storage
from sdiff_jax.reports import results
from sdiff_jax.reports.results import Result
from sdiff_jax.training import metric_writer, profiling, summary
from sdiff_jax.training.summary import Summary
from sdiff_jax.types import Json, UserError

T = TypeVar("T")

CONFIG = "config.json"


class _Piece(TypedDict):
  name: records.Name


class _Train(TypedDict):
  batch_size: NotRequired[records.Count]


class _Teacher(TypedDict):
  workdir: NotRequired[str]


class Config(TypedDict):
  """What a page shows of a config.json, apart from the whole file."""

  loss: _Piece
  model: _Piece
  data: _Piece
  train: NotRequired[_Train]
  plugins: NotRequired[list[str]]
  teacher: NotRequired[_Teacher]
  init_from: NotRequired[str]


class Run(NamedTuple):
  """Contents of a work directory; parts that are missing or damaged are empty.

  Attributes:
    path: of the directory.
    kind: of the model, see `title`.
    config: as in config.json.
    metrics: of training, by step.
    training: summary of training, as in training.json.
    operations: costliest operations of a trace, as in profile/operations.json.
    rows: results of the job `evaluate`, one for each sampler.
    rollouts: results of the job `rollout`, one for each sampler.
    command: of training.
    faults: one line for each file that cannot be read.
  """

  path: pathlib.Path
  kind: str
  config: Config | dict[str, Json]
  metrics: list[dict]
  training: Summary | dict[str, Json]
  operations: profiling.Operations | dict[str, Json]
  rows: list[Result]
  rollouts: list[Result]
  command: str
  faults: list[str]


def load(directory: str) -> Run:
  """Returns the contents of a work directory.

  Args:
    directory: of a run; it has a config.json.

  Raises:
    UserError: there is no config.json.
  """
  path, faults = storage.of(directory), list[str]()
  if not storage.lexists(path / CONFIG):
    raise UserError(
      f"{directory}: no config.json; make a run with --workdir={directory} --job=train"
    )

  def optional(name: str, read: Callable[..., T], default: T, *args: Json) -> T:
    if not storage.lexists(path / name):
      return default
    return tolerant(faults, default, read, path / name, *args)

  config = optional(CONFIG, read_config, {})
  return Run(
    path=path,
    kind=title(config["loss"]) if config else path.name,
    config=config,
    metrics=tolerant(faults, [], metric_writer.read_metrics, path),
    training=tolerant(faults, None, summary.read, path) or {},
    operations=optional(profiling.OPERATIONS, profiling.read, {}),
    rows=optional("evaluate/results.json", results.read, []),
    rollouts=optional(
      "rollout/results.json", results.read, [], results.ROLLOUT_COLUMNS
    ),
    command=optional("command.txt", file_io.read_text, "").strip(),
    faults=faults,
  )


def tolerant(faults: list[str], default: T, read: Callable[..., T], *args: Json) -> T:
  """Returns `read(*args)`; if it raises a UserError, `default`.

  Args:
    faults: gets the message of the error.
    default: the value of a damaged file.
    read: reads a file.
    *args: of the function.
  """
  try:
    return read(*args)
  except UserError as error:
    faults.append(str(error))
    return default


def read_config(path: pathlib.Path) -> Config:
  """Returns the content of a config.json.

  Args:
    path: of the file.

  Raises:
    UserError: the file is damaged.
  """
  return records.read(path, Config, "restore it, or train again with another --workdir")


def parent(config: Config) -> str:
  """Returns the work directory that a run was distilled or started from, or "".

  Args:
    config: of the run.

  Example:
    >>> parent({"teacher": {"workdir": "runs/teacher"}})
    'runs/teacher'
  """
  return config.get("teacher", {}).get("workdir") or config.get("init_from", "")


def title(loss: dict[str, Json]) -> str:
  """Returns the kind of a model by its section `loss`: teacher, sCD, sCT, ...

  Args:
    loss: the section; a loss of a plugin that is not installed has its name as title.
  """
  known = _facts(loss)
  return known.title if known else loss["name"]


def description(loss: dict[str, Json]) -> str:
  """Returns a sentence about the models of a loss, "" if the loss is not known here.

  Args:
    loss: the section of the config.
  """
  known = _facts(loss)
  return known.description if known else ""


def _facts(loss: dict[str, Json]) -> losses.Facts | None:
  """Returns the facts of a loss; None if it, or the value of a field, is not known."""
  try:
    fields = registry.fields("losses", loss["name"])
    return losses.facts(fields | loss)
  except (KeyError, TypeError, ValueError, UserError):
    return None
