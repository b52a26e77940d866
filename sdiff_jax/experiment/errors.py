"""Errors of the library in the terms of a config.

The library raises ValueError with a message that starts with the name of the argument:
`steps=0: must be at least 1`. Users of a config know that argument as a field.
"""

from sdiff_jax.registry import argument_errors as config_errors

__all__ = ["config_errors"]
