"""Values that a field or an argument may have, declared by its annotation.

    def build(
      *,
      width: Size = 256,
      dropout: Annotated[float, Range(0, below=1)] = 0.0,
      norm: Literal["double", "single"] = "double",
      mean: tuple[float, ...] = (0.0,),
    ): ...

Numbers are finite and integers below 2^31 in any case. `registry.register` checks the
arguments of a piece at every call, so the command line, config files, stored configs and
the Python API refuse the same values with the same message. Annotations of other types
(arrays, functions, networks) are not checked.
"""

from sdiff_jax.fields._checks import (
  Field,
  arguments,
  check,
  check_all,
  check_instance,
  checked,
  describe,
  quote,
)
from sdiff_jax.fields._vocabulary import (
  Choices,
  Count,
  Depth,
  DType,
  Fraction,
  HubPath,
  Index,
  Length,
  LogMean,
  Means,
  NotNegative,
  Path,
  Place,
  Positive,
  Range,
  Rate,
  Scales,
  Seed,
  Size,
  Timesteps,
)

__all__ = [
  "Choices",
  "Count",
  "DType",
  "Depth",
  "Field",
  "Fraction",
  "HubPath",
  "Index",
  "Length",
  "LogMean",
  "Means",
  "NotNegative",
  "Path",
  "Place",
  "Positive",
  "Range",
  "Rate",
  "Scales",
  "Seed",
  "Size",
  "Timesteps",
  "arguments",
  "check",
  "check_all",
  "check_instance",
  "checked",
  "describe",
  "quote",
]
