"""Errors of the library in the terms of a config."""

import pytest

from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.types import UserError


def test_a_value_error_gets_the_name_of_the_section():
  with (
    pytest.raises(UserError, match=r"^config\.sampler\.steps=0: must be at least 1$"),
    config_errors("config.sampler"),
  ):
    raise ValueError("steps=0: must be at least 1")


def test_other_errors_pass():
  with pytest.raises(UserError, match=r"^a file$"), config_errors("config.sampler"):
    raise UserError("a file")
