"""Networks: each public module of this package registers one, as its `build`."""

import functools

from sdiff_jax import registry

__getattr__ = functools.partial(registry.public_module, __name__)
