"""Fields of the config files of others."""

from collections.abc import Container
from typing import Any


def validated_config(
  config: dict[str, Any],
  defaults: dict[str, Any],
  only: dict[str, Container],
  unused: Container[str] = (),
) -> dict[str, Any]:
  """Returns the fields of a config that have a default, filled in.

  Args:
    config: of a config.json; names with a leading underscore say who wrote it.
    defaults: of the fields that are known.
    only: field -> the values of it that are known, where nothing else is.
    unused: fields that may say anything.

  Raises:
    ValueError: lists fields that are unknown and values that are not supported.
  """
  rest = {k: v for k, v in config.items() if k not in defaults and k not in unused}
  rest = {k: v for k, v in rest.items() if not k.startswith("_")}
  unknown = sorted(k for k in rest if k not in only)
  wrong = [f"{k}={v!r}" for k, v in rest.items() if k in only and v not in only[k]]
  problems = {"unknown fields": unknown, "values not supported": sorted(wrong)}
  if any(problems.values()):
    listed = (f"{k}: {', '.join(v)}" for k, v in problems.items() if v)
    raise ValueError("; ".join(listed))
  return {k: config.get(k, v) for k, v in defaults.items()}


def each(value: Any, count: int, field: str) -> tuple:
  """Returns one value for each of `count` levels.

  Raises:
    ValueError: a list of another length.
  """
  values = tuple(value) if isinstance(value, list | tuple) else (value,) * count
  if len(values) != count:
    raise ValueError(f"{field}={value!r}: must have {count} values, one a level")
  return values
