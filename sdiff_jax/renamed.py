"""Config fields that had another name or other values in earlier versions."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

from sdiff_jax.defaults import PIECES
from sdiff_jax.types import Json


class Renamed(NamedTuple):
  """A field that had another name or other values in an earlier version.

  Attributes:
    name: present name of the field.
    component: the only data set, network or loss that had the field; "" for any.
    values: old value -> new one.
  """

  name: str
  component: str = ""
  values: Mapping[str, str] = {}


# Fields that had another name or other values in an earlier version, by the old name.
# The command line refuses the old name with the new one in the message; `read` of a work
# directory accepts it.
RENAMED = {
  "conditional": Renamed("class_conditional"),
  "data.least": Renamed("data.min_range", "trajectories"),
  "demos.view": Renamed("data.frame", "trajectories"),
  "ema.posthoc": Renamed("ema.posthoc_std"),
  "evaluate.neighbours": Renamed("evaluate.pr_num_images"),
  "generate.negative": Renamed("generate.negative_prompt"),
  "generate.spacing": Renamed("generate.timestep_spacing"),
  "loss.segments": Renamed("loss.segment_boundaries"),
  "loss.stabiliser": Renamed("loss.tangent_normalizer"),
  "model.attention_at": Renamed("model.attn_resolutions"),
  "model.modulation": Renamed(
    "model.norm", "ddpmpp", {"double_norm": "double", "shift": "single"}
  ),
  "model.mults": Renamed("model.channel_mult", "edm2"),
  "model.norm": Renamed("model.norm", "edm2", {"scale": "single"}),
  "optim.final": Renamed("optim.end_lr_fraction"),
  "pod": Renamed("rehearse.topology"),
  "reference.least": Renamed("reference.min_range", "trajectories"),
  "rehearse.what": Renamed("rehearse.program"),
  "rollout.actions": Renamed("rollout.n_action_steps"),
  "rollout.filmed": Renamed("rollout.num_videos"),
  "rollout.noise": Renamed("rollout.noise_seed"),
  "rollout.timed": Renamed("rollout.num_timed"),
  "sample.compare": Renamed("sample.compare_sequential"),
  "sampler.angles": Renamed("sampler.timesteps"),
  "sampler.coarse": Renamed("sampler.coarse_workdir"),
  "sampler.rule": Renamed("sampler.update_rule"),
  "train.accumulate": Renamed("train.grad_accum_steps"),
}


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
    >>> renamed_fields({"optim.final": 0.1}, {})
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
