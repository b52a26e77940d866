"""Training: the trainer, its step and loop, optimizers, averages, checkpoints.

`Trainer` is what most users need; the modules are its parts.
"""

import functools

from sdiff_jax import registry
from sdiff_jax.training.state import TrainState
from sdiff_jax.training.trainer import Trainer, initialize_from

__all__ = ["TrainState", "Trainer", "initialize_from"]


__getattr__ = functools.partial(registry.public_module, __name__)
