"""Configs: the defaults of all fields, their ranges, and files of configs.

The fields of a component (data set, network, loss) are the arguments of its function.
The fields of a job are the `defaults` that it registers. All others are here.
"""

import copy
import difflib
import importlib
import importlib.util
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections

from sdiff_jax import registry
from sdiff_jax.io import resumable
from sdiff_jax.types import UserError

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

# Fields that had another name in an earlier version: old -> new. The command line
# refuses the old name with the new one in the message; `read` of a work directory
# accepts it.
RENAMED = {
  "conditional": "class_conditional",
  "ema.posthoc": "ema.posthoc_std",
  "evaluate.neighbours": "evaluate.pr_num_images",
  "generate.negative": "generate.negative_prompt",
  "generate.spacing": "generate.timestep_spacing",
  "loss.segments": "loss.segment_boundaries",
  "loss.stabiliser": "loss.tangent_normalizer",
  "model.attention_at": "model.attn_resolutions",
  "optim.final": "optim.end_lr_fraction",
  "pod": "rehearse.topology",
  "rehearse.what": "rehearse.program",
  "rollout.actions": "rollout.n_action_steps",
  "rollout.filmed": "rollout.num_videos",
  "rollout.noise": "rollout.noise_seed",
  "rollout.timed": "rollout.num_timed",
  "sample.compare": "sample.compare_sequential",
  "sampler.angles": "sampler.timesteps",
  "sampler.coarse": "sampler.coarse_workdir",
  "sampler.rule": "sampler.update_rule",
  "train.accumulate": "train.grad_accum_steps",
}
# Section of a component -> kind of the component.
PIECES = {"data": "data", "reference": "data", "model": "models", "loss": "losses"}


# Sections and fields outside of jobs that may change between two runs in one work
# directory: they do not change what is trained.
RUNTIME = ("checkpoint", "init_from", "job", "mesh", "model.remat", "plugins")
RUNTIME += ("reference", "sample", "sampler", "teacher", "vae")


class Ranged(NamedTuple):
  """A default value with the range of its field.

  Attributes:
    default: the value.
    minimum: bound from below.
    exclusive: whether the bound itself is refused.
  """

  default: float
  minimum: float
  exclusive: bool

  def check(self, name: str, value: float) -> None:
    """Checks a value of the field.

    Raises:
      UserError: the value is out of range, or not a number.
    """
    if not (value > self.minimum or (value == self.minimum and not self.exclusive)):
      bound = "must be above 0" if self.exclusive else "must not be negative"
      raise UserError(f"config.{name}={value}: {bound}")


def positive(default: float) -> Ranged:
  """Returns a default whose field must be above 0."""
  return Ranged(default, 0, exclusive=True)


def not_negative(default: float) -> Ranged:
  """Returns a default whose field must be 0 or above."""
  return Ranged(default, 0, exclusive=False)


# Fields that several jobs share, or that identify an experiment.
DEFAULTS = {
  "job": "train",  # what is done without --job
  "seed": 0,
  "sigma_d": positive(0.5),  # standard deviation that the data are scaled to
  # Data that `evaluate` compares with, a section like data; "" for data itself.
  "reference": {"name": ""},
  "class_conditional": True,  # the classes, if the data have some, are conditions
  # Work directory whose averaged weights the network starts from; "" for random ones.
  "init_from": "",
  "teacher": {
    "workdir": "",  # trained run to distill, for losses that need a teacher
    # Config file that trains the teacher, or the run of init_from, for messages.
    "config": "",
  },
  "optim": {
    "name": "adam",  # adam, adamw or radam
    "learning_rate": positive(1e-3),
    "schedule": "constant",  # constant, cosine or inverse_sqrt
    "rampup_images": 0,  # linear warm-up of the learning rate over this many images
    "end_lr_fraction": 0.0,  # cosine: final rate, as a fraction of learning_rate
    "reference_steps": 35_000,  # inverse_sqrt: constant until this step
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,  # adamw
    "clip": not_negative(0.0),  # maximal global norm of the gradient; 0 for none
  },
  "ema": {
    # "power/sigma_rel" (EDM2), "half_life/images" or "warmup/power" (Diffusion Policy:
    # decay 1 - n^-power); the first one is sampled from.
    "profiles": ("power/0.05",),
  },
  "checkpoint": {
    "every": positive(1000),  # steps
    "keep": positive(2),  # number of the newest checkpoints that are kept
    "keep_every": not_negative(0),  # steps between checkpoints kept for good; 0: none
  },
  "sampler": {
    # A solver of samplers/solvers (heun, ddim, ddpm, dpmpp2m, ...), run sequentially;
    # or in parallel with a prefix: para (ParaDiGMS), spec (speculative sampling, which
    # does not change the distribution) or srds (parareal). Examples: paraddpm,
    # specddpm, srdsddim.
    "name": "heun",
    "steps": 16,
    "timesteps": (),  # TrigFlow times of the steps, instead of the solver's grid
    "eta": 0.0,  # ddim: fraction of DDPM's noise
    "temperature": 1.0,  # factor of all noise; below 1 samples stay near the modes
    "window": 0,  # solver steps evaluated at a time; 0 chooses it by timing the network
    "tolerance": 0.1,  # para, srds: 1 is a tenth of the data's standard deviation
    "update_rule": "secant",  # para: secant, picard, linear or published
    "coarse_workdir": "",  # srds: work directory of a consistency model; "" for DDIM
  },
  "sample": {
    "num": positive(64),
    "batch_size": positive(64),  # over all devices
    "seed": 0,  # image k is made from seed + k alone
    "guidance": 1.0,  # scale of classifier-free guidance; 1 for none
    "label": -1,  # class of every image; -1 for all classes in turn
    "compare_sequential": False,  # also time the sequential sampler on one batch
    "checkpoint": 0,  # step to sample from (see checkpoint.keep_every); 0: the newest
  },
  # Autoencoder in the diffusers format, a folder or hf://organization/name: `encode`
  # computes latents by it, and samples of networks trained on latents become images.
  "vae": "",
  # Devices along each axis; -1 uses all that remain.
  "mesh": {"data": -1, "fsdp": 1, "window": 1},
}


def component(kind: str, name: str, **changed: Any) -> ml_collections.ConfigDict:
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


def _defaults() -> dict[str, Any]:
  """Returns the defaults of all fields outside of components, with their ranges."""
  defaults = copy.deepcopy(DEFAULTS)
  for _, job in _jobs():
    for section, fields in job.facts.get("defaults", {}).items():
      defaults[section] = defaults.get(section, {}) | fields
  return defaults


def _jobs() -> Iterator[tuple[str, registry.Piece]]:
  for name in registry.names("jobs"):
    yield name, registry.lookup("jobs", name)


def _plain(value: Any) -> Any:
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
  """
  load_plugins(config.plugins)
  for section, kind in PIECES.items():
    if config[section].name or section != "reference":
      registry.check(kind, config[section].to_dict(), f"config.{section}")
  values = resumable.flatten(config.to_dict())
  for name in values.keys() & RENAMED.keys():
    raise UserError(f"config.{name}: is now config.{RENAMED[name]}")
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


def with_new_names(stored: dict[str, Any]) -> dict[str, Any]:
  """Returns a stored config with the present names of its fields (see `RENAMED`).

  Args:
    stored: config of a work directory, as nested dicts.
  """
  stored = copy.deepcopy(stored)
  for old, new in RENAMED.items():
    section, _, field = old.rpartition(".")
    values = stored.get(section, {}) if section else stored
    if field in values:
      new_section, _, new_field = new.rpartition(".")
      target = stored.setdefault(new_section, {}) if new_section else stored
      target[new_field] = values.pop(field)
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
