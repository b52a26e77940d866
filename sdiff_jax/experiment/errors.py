"""Errors of the library in the terms of a config.

The library raises ValueError with a message that starts with the name of the argument:
`steps=0: must be at least 1`. Users of a config know that argument as a field.
"""

import contextlib
from collections.abc import Iterator

from sdiff_jax.types import UserError


@contextlib.contextmanager
def config_errors(section: str) -> Iterator[None]:
  """Turns a ValueError into a UserError that names the field of a config.

  Args:
    section: what the arguments are fields of, such as "config.sampler".

  Raises:
    UserError: "config.sampler.steps=0: must be at least 1" for the ValueError
      "steps=0: must be at least 1".

  Example:
    >>> with config_errors("config.sampler"):
    ...   raise ValueError("steps=0: must be at least 1")
    Traceback (most recent call last):
    ...
    sdiff_jax.types.UserError: config.sampler.steps=0: must be at least 1
  """
  try:
    yield
  except ValueError as error:
    raise UserError(f"{section}.{error}") from error
