"""Validation of the config files of other projects."""

from collections.abc import Container

from sdiff_jax.types import Json


def validated_config(
  config: dict[str, Json],
  defaults: dict[str, Json],
  supported: dict[str, Container],
  ignored: Container[str] = (),
) -> dict[str, Json]:
  """Returns the fields of a config that have a default, filled in.

  Args:
    config: of a config.json; names with a leading underscore are metadata.
    defaults: fields with any value -> their defaults.
    supported: fields with only some supported values -> these values.
    ignored: fields that are not used.

  Raises:
    ValueError: lists all unknown fields and all values that are not supported.

  Example:
    >>> validated_config({"width": 8, "act": "gelu"}, {"width": 4}, {"act": ("gelu",)})
    {'width': 8}
  """
  rest = {k: v for k, v in config.items() if k not in defaults and k not in ignored}
  rest = {k: v for k, v in rest.items() if not k.startswith("_")}
  unknown = sorted(k for k in rest if k not in supported)
  unsupported = sorted(
    f"{k}={v!r}" for k, v in rest.items() if k in supported and v not in supported[k]
  )
  problems = {"unknown fields": unknown, "values not supported": unsupported}
  if any(problems.values()):
    listed = (f"{k}: {', '.join(v)}" for k, v in problems.items() if v)
    raise ValueError("; ".join(listed))
  return {k: config.get(k, v) for k, v in defaults.items()}


def each(value: Json, count: int, field: str) -> tuple:
  """Returns one value for each of `count` levels.

  Args:
    value: a list of them, or one value for all levels.
    count: number of levels.
    field: name of the config field.

  Raises:
    ValueError: a list of another length.

  Example:
    >>> each(8, 3, "attention_head_dim")
    (8, 8, 8)
  """
  values = tuple(value) if isinstance(value, list | tuple) else (value,) * count
  if len(values) != count:
    raise ValueError(f"{field}={value!r}: must have {count} values, one for each level")
  return values
