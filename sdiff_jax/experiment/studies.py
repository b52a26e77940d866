"""The config of a study: runs of several experiments, and the figure they end in."""

import ast
import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import ml_collections

from sdiff_jax import config as configs
from sdiff_jax import fields
from sdiff_jax.experiment import variants
from sdiff_jax.fields import Length, Range
from sdiff_jax.reports import studies
from sdiff_jax.types import Json, UserError

# Variant -> config files of the runs, and the fields that all runs of a study change.
SETTINGS = {
  "": (
    "configs/fashion_{}.py",
    (
      "model.width=256",
      "train.sample_every=0",
      "evaluate.num=5000",
      "evaluate.baselines=False",
    ),
  ),
  "digits": (
    "configs/digits_{}.py",
    (
      "model.width=128",
      "model.depth=3",
      "train.sample_every=0",
      "evaluate.baselines=False",
    ),
  ),
  "unet": (
    "configs/fashion_unet_{}.py:laptop",
    (
      "train.sample_every=0",
      "evaluate.num=2000",
      "evaluate.batch_size=500",
      "evaluate.baselines=False",
    ),
  ),
  "paper": ("configs/imagenet64_{}.py:S", ("evaluate.num=50_000",)),
  "tiny": (
    "configs/digits_{}.py",
    (
      "model.width=16",
      "model.depth=1",
      "train.steps=4",
      "train.sample_every=0",
      "checkpoint.every=2",
      "checkpoint.keep_every=2",
      "evaluate.num=64",
      "evaluate.batch_size=64",
      "evaluate.baselines=False",
    ),
  ),
}


def parse_variant(variant: str) -> tuple[str, tuple[str, ...]]:
  """Returns the entry of SETTINGS for the variant of a study's file.

  Raises:
    ValueError: there is no such variant.
  """
  (word,) = variants.parse(variant, SETTINGS)
  return SETTINGS[word]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One run of a study; see `run`.

  Attributes:
    name: of the run.
    config: config of the experiment, "configs/X.py" or "configs/X.py:variant".
    set: changes of fields, each "section.field=value".
    teacher: name of the run that this one distills.
    weights: name of the run whose network is measured; "" trains one.
    start: name of the run whose weights this one starts from; "" for its teacher's.
    budget: floating-point operations of training, those of `start` included, divided by
      the teacher's: they set train.steps. None leaves that field as it is.
    series: name of its points; "" for the names of the run and the sampler.
    guidance: scale of guidance of its points, if that is an axis.
    checkpoints: whether all stored checkpoints are measured, instead of the last.
    drawn: whether its points are drawn.
  """

  name: str
  config: str
  set: tuple[str, ...] = ()
  teacher: str = ""
  weights: str = ""
  start: str = ""
  budget: Annotated[float | None, Range(1e-6, 1e6)] = None
  series: str = ""
  guidance: Annotated[float | None, Range(0, 1000)] = None
  checkpoints: bool = False
  drawn: bool = True

  def __post_init__(self) -> None:
    fields.check_instance(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """The runs of a study and its figure, which the files of configs/studies set.

  Attributes:
    name: of its files.
    runs: the runs, each with the fields of `Run`; a teacher comes before its students.
    title: of the page.
    lead: the question of the study.
    x: key of a point for the horizontal axis.
    panels: keys of a point for the vertical axis of each panel; (x, y) for a panel with
      another horizontal axis; "y@key=value" for the points with that value.
    columns: keys of further columns of the table.
    log: the logarithmic axes.
    source: where the points come from, see `build`.
    seeds: every run is repeated with each of them.
    set: fields that differ in all runs, see `Run`.
  """

  name: str = ""
  runs: tuple[Json, ...] = ()
  title: str = ""
  lead: str = ""
  x: str = ""
  panels: tuple[Json, ...] = ()
  columns: tuple[str, ...] = ()
  log: Literal["", "x", "y", "xy"] = ""
  source: Literal["evaluate", "tangent", "parallel", "log"] = "evaluate"
  seeds: Annotated[tuple[int, ...], Range(0), Length(1)] = (0, 1, 2)
  set: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    known = fields.arguments(Run)
    for k, entry in enumerate(self.runs):
      if (
        not isinstance(entry, Mapping) or entry.keys() - known or "config" not in entry
      ):
        raise ValueError(
          f"runs[{k}]={fields.quote(entry)}: must have {', '.join(known)}"
        )
      try:
        Run(**entry)
      except ValueError as error:
        raise ValueError(f"runs[{k}].{error}") from error


def run(
  file: str,
  *changes: str,
  teacher: str = "",
  weights: str = "",
  start: str = "",
  budget: float | None = None,
  series: str = "",
  guidance: float | None = None,
  checkpoints: bool = False,
  drawn: bool = True,
) -> dict[str, Json]:
  """Returns one run of a study.

  Args:
    file: config of the experiment, "configs/X.py" or "configs/X.py:variant".
    *changes: each "section.field=value"; "loss=scm_discrete" switches to another
      component, which keeps the fields that both have.
    teacher: name of the run that this one distills.
    weights: name of the run whose network is measured; "" trains one.
    start: name of the run whose weights this one starts from; "" for its teacher's.
    budget: floating-point operations of training, those of `start` included, divided by
      the teacher's; None for the number of steps of the file.
    series: name of its points; "" for the names of the run and the sampler.
    guidance: scale of guidance of its points, if that is an axis.
    checkpoints: whether to measure all stored checkpoints, instead of the last.
    drawn: whether its points are drawn; False for runs that only others need.
  """
  return {
    "config": file,
    "set": changes,
    "teacher": teacher,
    "weights": weights,
    "start": start,
    "budget": budget,
    "series": series,
    "guidance": guidance,
    "checkpoints": checkpoints,
    "drawn": drawn,
  }


def build(
  name: str,
  runs: dict[str, dict[str, Json]],
  *,
  title: str,
  lead: str,
  x: str,
  panels: tuple[studies.Panel, ...],
  columns: tuple[str, ...] = (),
  log: str = "",
  source: str = "evaluate",
  seeds: tuple[int, ...] = (0, 1, 2),
  changes: tuple[str, ...] = (),
) -> ml_collections.ConfigDict:
  """Returns the config of a study.

  Args:
    name: of its files.
    runs: name -> `run`; a teacher comes before its students.
    title: of the page.
    lead: the question of the study, in a sentence or two.
    x: key of a point for the horizontal axis.
    panels: keys of a point for the vertical axis of each panel; (x, y) for a panel with
      another horizontal axis; "y@key=value" for the points with that value.
    columns: keys of further columns of the table.
    log: the logarithmic axes, some of "xy".
    source: where the points come from: "evaluate" for the rows of that job, "tangent"
      for these with the terms of the tangent, "parallel" for the cost of parallel
      samplers (see probes.py), "log" for the lines of the training log.
    seeds: every run is repeated with each of them.
    changes: fields that differ in all runs, see `run`.
  """
  c = configs.base()
  c.job = "study"
  c.study.update(
    name=name,
    runs=tuple({"name": k} | v for k, v in runs.items()),
    title=title,
    lead=lead,
    x=x,
    panels=panels,
    columns=columns,
    log=log,
    source=source,
    seeds=seeds,
    set=changes,
  )
  return c


def apply(config: ml_collections.ConfigDict, change: str) -> None:
  """Changes a config by "section.field=value", or "section=name" for a component.

  A component keeps the fields that it shares with the previous one. Unlike the flags of
  `ml_collections.config_flags`, the changes are read from a file.

  Raises:
    UserError: there is no such field, or it has another type.
  """
  field, _, text = change.partition("=")
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text  # a string without quotes
  if field in configs.PIECES:
    previous = config[field].to_dict()
    configs.switch(config, field, value)
    shared = ({*previous} & {*config[field]}) - {"name"}
    config[field].update({k: previous[k] for k in shared})
    return
  config.lock()  # so that fields that do not exist are refused
  try:
    config.update_from_flattened_dict({field: value})
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(f"config.study: {change}: {error}") from error
  finally:
    config.unlock()
