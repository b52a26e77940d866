"""Configs: assembled from defaults, read from files, and validated.

The fields of a component (data set, network, loss) are the arguments of its function, and
those of `sampler` also the options of solvers and sampling loops. The fields of a job are
the dataclasses that it registers as `sections`. All others are in sdiff_jax/defaults.py.
Each field declares what it may hold (see sdiff_jax/fields.py).
"""

import difflib
import importlib
import importlib.util
import inspect
import math
import os
from collections.abc import Iterable, Iterator, Mapping

import ml_collections

from sdiff_jax import fields, registry
from sdiff_jax.defaults import PIECES, RUNTIME, SECTIONS
from sdiff_jax.fields import Field
from sdiff_jax.io import resumable
from sdiff_jax.renamed import RENAMED, renamed_fields
from sdiff_jax.types import Json, UserError

__all__ = [
  "base",
  "component",
  "inherit",
  "load",
  "load_plugins",
  "switch",
  "validate",
]

MAX_MESSAGE = 300  # characters of an error of a config file
# What is put before the names of fields in messages.
LABEL = "config"
# Kinds of pieces whose options are fields of `sampler`, besides those of defaults.py.
SAMPLERS = ("samplers", "samplers.solvers")


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
  registry.check_names(kind, {"name": name, **changed}, kind)
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
      if not all(part.isidentifier() for part in name.split(".")):
        raise ModuleNotFoundError("must be the dotted name of a module")
      importlib.import_module(name)
    except ModuleNotFoundError as error:
      raise UserError(
        f"config.plugins={fields.quote(name)}: {error}; install it, or add its directory "
        "to PYTHONPATH"
      ) from error
    except (Exception, SystemExit) as error:  # of code that the user wrote
      raise UserError(f"config.plugins={name!r}: {_error(error)}") from error


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
  values = {
    section: {name: field.default for name, field in members.items()}
    for section, members in declarations().items()
  }
  config = ml_collections.ConfigDict(values.pop("") | values)
  config.plugins = plugins
  config.reference = ml_collections.ConfigDict({"name": ""})
  config.data = component("data", "digits")
  config.model = component("models", "mlp")
  config.loss = component("losses", "diffusion")
  return config


def declarations() -> dict[str, dict[str, Field]]:
  """Returns section -> name -> field of all sections but those of components.

  The section of fields outside of sections is "".

  Example:
    >>> declarations()["train"]["batch_size"].describe()
    'an integer of at least 1'
  """
  out: dict[str, dict[str, Field]] = {}
  for section, declared in _section_types():
    out[section] = out.get(section, {}) | fields.arguments(declared)
  registry.import_modules("sdiff_jax.contrib")
  for kind in SAMPLERS:
    for name in registry.names(kind):
      options = registry.declarations(kind, name)
      out["sampler"] |= {k: v for k, v in options.items() if k not in out["sampler"]}
  return out


def _section_types() -> Iterator[tuple[str, type]]:
  """Yields all sections and the dataclasses that declare their fields."""
  yield from SECTIONS.items()
  for _, job in _jobs():
    yield from job.facts.get("sections", {}).items()


def _jobs() -> Iterator[tuple[str, registry.Piece]]:
  for name in registry.names("jobs"):
    yield name, registry.lookup("jobs", name)


def complete(config: ml_collections.ConfigDict) -> None:
  """Imports the plugins of a config, and adds the sections of their jobs.

  Raises:
    UserError: a plugin cannot be imported.
  """
  before = declarations()
  load_plugins(_plugins(config.to_dict()))
  for section, members in declarations().items():
    added = members.keys() - before.get(section, {}) - {*config.get(section, {})}
    if added:
      with config.unlocked():
        config.update({section: {name: members[name].default for name in added}})


def _plugins(values: Mapping[str, Json]) -> tuple[str, ...]:
  """Returns the plugins of a config.

  Raises:
    UserError: they are no names of modules.
  """
  plugins = values.get("plugins", ())
  with registry.argument_errors(LABEL):
    fields.check(
      "plugins", plugins, fields.arguments(SECTIONS[""])["plugins"].annotation
    )
  return tuple(plugins)


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
  if not os.path.isfile(path) or not path.endswith(".py"):
    raise UserError(f"--config={path}: must be a Python file (.py)")
  try:
    config = inherit(path, variant)
  except UserError:
    raise
  except (Exception, SystemExit) as error:  # of code that the user wrote
    raise UserError(f"{file}: {_error(error)}") from error
  _check_sections(config.to_dict())
  return config


def _error(error: BaseException) -> str:
  """Returns the type and the message of an error on one line of bounded length."""
  name = "" if type(error) is ValueError else f"{type(error).__name__}: "
  text = " ".join(f"{name}{error}".split())
  return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."


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
  if not callable(getattr(module, "get_config", None)):
    raise ValueError("the file must define get_config(), which returns a config")
  if variant and not inspect.signature(module.get_config).parameters:
    raise ValueError("the file has no variants")
  config = module.get_config(variant) if variant else module.get_config()
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(
      "get_config() must return the config that config.base() returns, with changes, "
      f"not {type(config).__name__}"
    )
  return config


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks what can be checked before any work starts.

  Args:
    config: of an experiment, with all fields.

  Raises:
    UserError: one line that names field, value and remedy.

  Example:
    >>> validate(base())
  """
  check(config.to_dict())


def check(values: Mapping[str, Json]) -> None:
  """Checks all fields of a config, of which none may be missing.

  Args:
    values: nested, as in config.json, with tuples.

  Raises:
    UserError: see `validate`.
  """
  load_plugins(_plugins(values))
  _check_sections(values)
  renamed = renamed_fields(resumable.flatten(values), values)
  for name, message in renamed.items():
    raise UserError(f"{LABEL}.{name}: {message.format(f'{LABEL}.')}")
  declared = declarations()
  _check_names(values, declared)
  for section, kind in PIECES.items():
    if values[section].get("name") or section != "reference":
      registry.check(kind, values[section], f"{LABEL}.{section}")
  for section, members in declared.items():
    label = f"{LABEL}.{section}" if section else LABEL
    inside = values[section] if section else values
    missing = members.keys() - inside.keys()
    if missing:
      raise UserError(f"{label}.{min(missing)}: is missing; start from config.base()")
    with registry.argument_errors(label):
      fields.check_all(inside, members)
  for section, declaration in _section_types():  # relations
    own = fields.arguments(declaration)
    inside = values[section] if section else values
    with registry.argument_errors(f"{LABEL}.{section}" if section else LABEL):
      declaration(**{k: inside[k] for k in own})


def _check_sections(values: Mapping[str, Json]) -> None:
  """Checks that a config has all sections.

  Raises:
    UserError: it has not.
  """
  declared = declarations()
  for section in (*PIECES, *filter(None, declared)):
    if not isinstance(values.get(section), Mapping):
      raise UserError(
        f"{LABEL}.{section}={fields.quote(values.get(section))}: must be a section of "
        "fields; start from config.base()"
      )


def _check_names(values: Mapping[str, Json], declared: Mapping[str, Mapping]) -> None:
  """Checks that a config has no fields outside of components that nobody declares.

  Raises:
    UserError: it has one.
  """
  known = [f"{s}.{k}" if s else k for s, m in declared.items() for k in m]
  for name in sorted(resumable.flatten(values).keys() - known):
    if name.partition(".")[0] in PIECES or name in RENAMED:
      continue
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {LABEL}.{near[0]}?" if near else ""
    raise UserError(f"{LABEL}.{name[:80]}: there is no such field{hint}")


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
    value = float(number)
  except ValueError:
    value = math.nan
  if not math.isfinite(value):
    raise UserError(
      f"config.{field}: {fields.quote(text)} is not of the form name/number"
    )
  return name, value
