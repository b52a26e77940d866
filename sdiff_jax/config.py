"""Configs: assembled from defaults, read from files, and validated.

The fields of a component (data set, network, loss) are the arguments of its function.
The fields of a job are the `defaults` that it registers. All others are in
sdiff_jax/defaults.py.
"""

import copy
import difflib
import importlib
import importlib.util
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping

import ml_collections

from sdiff_jax import registry
from sdiff_jax.defaults import (
  DEFAULTS,
  RENAMED,
  RUNTIME,
  Ranged,
  Renamed,
  not_negative,
  positive,
)
from sdiff_jax.io import resumable
from sdiff_jax.types import Json, UserError

__all__ = [
  "base",
  "component",
  "inherit",
  "load",
  "load_plugins",
  "not_negative",
  "positive",
  "switch",
  "validate",
]

# Section of a component -> kind of the component.
PIECES = {"data": "data", "reference": "data", "model": "models", "loss": "losses"}


def component(kind: str, name: str, **changed: Json) -> ml_collections.ConfigDict:
  """Returns the section of a component: its name and the fields of its function.

  Args:
    kind: "data", "models" or "losses".
    name: of the component.
    **changed: fields that differ from the defaults.

  Raises:
    UserError: an unknown component or field.

  Example:
    >>> component("losses", "diffusion", p_std=1.0).p_std
    1.0
  """
  section = {"name": name} | registry.fields(kind, name)
  registry.check(kind, {"name": name, **changed}, kind)
  return ml_collections.ConfigDict(section | changed)


def switch(config: ml_collections.ConfigDict, section: str, name: str) -> None:
  """Replaces the component of a section by another one with its defaults.

  Args:
    config: changed in place.
    section: "data", "reference", "model" or "loss".
    name: of the new component.

  Raises:
    UserError: an unknown component.

  Example:
    >>> config = base()
    >>> switch(config, "model", "dit")
    >>> config.model.patch > 0
    True
  """
  if config[section].name != name:
    config[section] = component(PIECES[section], name)


def load_plugins(modules: Iterable[str]) -> None:
  """Imports modules that register components or jobs of their own.

  Args:
    modules: dotted names, as in `config.plugins`.

  Raises:
    UserError: there is no such module.

  Example:
    >>> load_plugins(("json",))
  """
  for name in modules:
    try:
      importlib.import_module(name)
    except ModuleNotFoundError as error:
      raise UserError(
        f"config.plugins={name!r}: {error}; install it, or add its directory to "
        "PYTHONPATH"
      ) from error


def base(plugins: tuple[str, ...] = ()) -> ml_collections.ConfigDict:
  """Returns the defaults of all fields; an experiment file changes some of them.

  Args:
    plugins: modules outside this package that register components or jobs; they are
      imported here, and wherever the config is read again.

  Raises:
    UserError: a plugin cannot be imported.

  Example:
    >>> base().model.name
    'mlp'
  """
  load_plugins(plugins)
  config = ml_collections.ConfigDict(_plain(_defaults()))
  config.plugins = plugins
  config.data = component("data", "digits")
  config.model = component("models", "mlp")
  config.loss = component("losses", "diffusion")
  return config


def _defaults() -> dict[str, Json]:
  """Returns the defaults of all fields outside of components, with their ranges."""
  defaults = copy.deepcopy(DEFAULTS)
  for _, job in _jobs():
    for section, fields in job.facts.get("defaults", {}).items():
      defaults[section] = defaults.get(section, {}) | fields
  return defaults


def _jobs() -> Iterator[tuple[str, registry.Piece]]:
  for name in registry.names("jobs"):
    yield name, registry.lookup("jobs", name)


def _plain(value: Json) -> Json:
  """Returns defaults without their ranges."""
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  return value.default if isinstance(value, Ranged) else value


def complete(config: ml_collections.ConfigDict) -> None:
  """Imports the plugins of a config, and adds the sections of jobs that it lacks.

  Raises:
    UserError: a plugin cannot be imported.
  """
  load_plugins(config.plugins)
  missing = {k: v for k, v in _plain(_defaults()).items() if k not in config}
  with config.unlocked():
    config.update(missing)


def runtime_fields() -> set[str]:
  """Returns the sections and fields that do not identify an experiment.

  They are RUNTIME and what jobs register as `runtime`.
  """
  names = {*RUNTIME}
  for _, job in _jobs():
    names |= {*job.facts.get("runtime", ())}
  return names


def load(file: str, missing: str = "") -> ml_collections.ConfigDict:
  """Returns the config of a file, "configs/X.py" or "configs/X.py:variant".

  Args:
    file: the file and its variant.
    missing: message of the error if there is no such file.

  Raises:
    UserError: the file does not exist, or has no such variant.

  Example:
    >>> load("nothing.py")
    Traceback (most recent call last):
    sdiff_jax.types.UserError: --config=nothing.py: no such file
  """
  path, _, variant = file.partition(":")
  if not os.path.exists(path):
    raise UserError(missing or f"--config={path}: no such file")
  try:
    return inherit(path, variant)
  except ValueError as error:
    raise UserError(f"{file}: {error}") from error


def inherit(
  path: str | os.PathLike[str], variant: str = ""
) -> ml_collections.ConfigDict:
  """Returns the config of another file, for a config file to change some fields of.

  Args:
    path: of the file.
    variant: of the file.

  Raises:
    ValueError: the file has no such variant.

  Example:
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "base.py")
    >>> _ = path.write_text("from sdiff_jax.config import base as get_config")
    >>> inherit(path).model.name
    'mlp'
  """
  spec = importlib.util.spec_from_file_location("loaded_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not variant:
    return module.get_config()
  if not inspect.signature(module.get_config).parameters:
    raise ValueError("the file has no variants")
  return module.get_config(variant)


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks what can be checked before any work starts.

  Args:
    config: of an experiment, with all fields.

  Raises:
    UserError: one line that names field, value and remedy.

  Example:
    >>> validate(base())
  """
  load_plugins(config.plugins)
  values = resumable.flatten(config.to_dict())
  for name, message in renamed_fields(values, config.to_dict()).items():
    raise UserError(f"config.{name}: {message.format('config.')}")
  for section, kind in PIECES.items():
    if config[section].name or section != "reference":
      registry.check(kind, config[section].to_dict(), f"config.{section}")
  defaults = resumable.flatten(_defaults())
  for name in sorted(values.keys() - defaults.keys()):
    if name.partition(".")[0] not in {*PIECES, "plugins", "study"}:
      near = difflib.get_close_matches(name, defaults, 1)
      hint = f"; did you mean config.{near[0]}?" if near else ""
      raise UserError(f"config.{name}: there is no such field{hint}")
  for name, default in defaults.items():
    if isinstance(default, Ranged) and name in values:
      default.check(name, values[name])
  if not config.ema.profiles:
    raise UserError("config.ema.profiles=(): name one profile, such as 'power/0.05'")


def renamed_fields(
  values: Mapping[str, Json], components: Mapping[str, Json]
) -> dict[str, str]:
  """Returns a message for each field of which the name or the value is an old one.

  Args:
    values: value of each field, by "section.field".
    components: sections of the config, of which the components' names are read.

  Returns:
    name of the field -> message, in which "{}" stands before the new name.

  Example:
    >>> renamed_fields({"optim.final": 0.1}, base().to_dict())
    {'optim.final': 'is now {}optim.end_lr_fraction'}
  """
  messages = {}
  for old in sorted(values.keys() & RENAMED.keys()):
    new = RENAMED[old]
    if new.name != old:
      if old.partition(".")[0] in PIECES and not _concerns(new, components):
        continue  # a field of another component, which has a right to the name
      messages[old] = f"is now {{}}{new.name}"
    elif _concerns(new, components) and _new_value(new, values[old]) != values[old]:
      value = _new_value(new, values[old])
      messages[old] = f"the value {values[old]!r} is now {value!r}"
  return messages


def _concerns(renamed: Renamed, components: Mapping[str, Json]) -> bool:
  """Returns whether the component that had the field is the one of the config."""
  section = renamed.name.partition(".")[0]
  name = components.get(section, {}).get("name")
  return renamed.component in ("", name)


def _new_value(renamed: Renamed, value: Json) -> Json:
  return renamed.values.get(value, value) if isinstance(value, str) else value


def with_new_names(stored: dict[str, Json]) -> dict[str, Json]:
  """Returns a stored config with the present names and values of its fields.

  They are those of `RENAMED`. A field that belongs to a component now, and that the
  component of the config never had, is removed.

  Args:
    stored: config of a work directory, as nested dicts.
  """
  stored = copy.deepcopy(stored)
  for old, new in RENAMED.items():
    section, _, field = old.rpartition(".")
    new_section, _, new_field = new.name.rpartition(".")
    values = stored.get(section, {}) if section else stored
    if field not in values:
      continue
    if _concerns(new, stored):
      value = _new_value(new, values.pop(field))
      target = stored.setdefault(new_section, {}) if new_section else stored
      target[new_field] = value
    elif section != new_section:
      del values[field]
  return stored


def name_and_number(text: str, field: str) -> tuple[str, float]:
  """Splits "heun/16" into ("heun", 16.0).

  Args:
    text: a name and a number with a slash between them.
    field: of the config that holds the text, for the message.

  Raises:
    UserError: the text is not of that form.
  """
  name, _, number = text.partition("/")
  try:
    return name, float(number)
  except ValueError:
    message = f"config.{field}: {text!r} is not of the form name/number"
    raise UserError(message) from None
