"""What a declaration may say: bounds, lengths, choices, and common types of fields."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

from sdiff_jax.io import storage


@dataclasses.dataclass(frozen=True)
class Range:
  """Bounds of a number, or of each element of a tuple of numbers.

  Attributes:
    minimum: smallest value; None for no bound.
    maximum: largest value.
    above: bound from below that is excluded itself.
    below: bound from above that is excluded itself.
    finite: whether infinity is refused.

  Example:
    >>> str(Range(0, below=1)), str(Range(above=0)), str(Range(1, 8))
    ('at least 0 and below 1', 'above 0', 'from 1 to 8')
  """

  minimum: float | None = None
  maximum: float | None = None
  above: float | None = None
  below: float | None = None
  finite: bool = True

  def __str__(self) -> str:
    if self.minimum is not None and self.maximum is not None:
      return f"from {_plain(self.minimum)} to {_plain(self.maximum)}"
    bounds = {"at least": self.minimum, "above": self.above}
    bounds |= {"at most": self.maximum, "below": self.below}
    given = {k: v for k, v in bounds.items() if v is not None}
    return " and ".join(f"{k} {_plain(v)}" for k, v in given.items())

  def __contains__(self, value: float) -> bool:
    return not (
      value != value  # NaN
      or (self.minimum is not None and value < self.minimum)
      or (self.maximum is not None and value > self.maximum)
      or (self.above is not None and value <= self.above)
      or (self.below is not None and value >= self.below)
    )


def _plain(number: float) -> str:
  whole = number == round(number) and abs(number) < 1e10
  return str(round(number)) if whole else f"{number:.6g}"


@dataclasses.dataclass(frozen=True)
class Length:
  """Smallest and largest number of elements of a tuple.

  Attributes:
    minimum: number of elements.
    maximum: number of elements.
  """

  minimum: int = 0
  maximum: int = 1000


@dataclasses.dataclass(frozen=True)
class Choices:
  """The texts that a field may have, where a table determines them.

  Attributes:
    names: the texts, or a function that returns them.

  Example:
    >>> from sdiff_jax.fields import check
    >>> check("size", "XS", Annotated[str, Choices(("S", "M"))])
    Traceback (most recent call last):
    ...
    ValueError: size='XS': must be one of S, M
  """

  names: Iterable[str] | Callable[[], Iterable[str]]

  def values(self) -> tuple[str, ...]:
    """Returns the texts."""
    return tuple(self.names() if callable(self.names) else self.names)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the file or folder that a text names may lie: here, or at some URLs.

  Attributes:
    schemes: of the URLs.

  Example:
    >>> str(Place()), "gs://bucket/run" in Place(), "s3://bucket/run" in Place()
    ('a path of this machine, or start with gs://', True, False)
  """

  schemes: tuple[str, ...] = ("gs",)

  def __str__(self) -> str:
    return storage.problem("://", self.schemes)

  def __contains__(self, value: str | os.PathLike[str]) -> bool:
    return not storage.problem(os.fspath(value), self.schemes)


Path = Annotated[str, Place()]  # of a file or folder; "" for none
HubPath = Annotated[
  str, Place(("gs", "hf"))
]  # of a folder of the Hugging Face Hub, too
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(0, below=1)]  # of dropout
Count = Annotated[int, Range(1)]
Index = Annotated[int, Range(0)]
Size = Annotated[int, Range(1, 65_536)]  # of a layer
Depth = Annotated[int, Range(1, 1000)]  # number of layers
DType = Literal["float32", "bfloat16", "float16", "float64"]
Means = Annotated[tuple[float, ...], Range(-1e6, 1e6), Length(1)]  # of channels
Scales = Annotated[tuple[float, ...], Range(above=0, maximum=1e6), Length(1)]
Seed = Annotated[int, Range(0, 2**31 - 1)]
# TrigFlow times at which solver steps start; 1.5708 stands for pi/2.
Timesteps = Annotated[
  tuple[float, ...], Range(above=0, maximum=1.5708), Length(0, 100_000)
]
LogMean = Annotated[float, Range(-100, 100)]  # of a logarithm
