"""Training: the trainer, its step and loop, optimizers, averages, checkpoints.

`Trainer` is what most users need; the modules are its parts.
"""

from sdiff_jax.training.state import TrainState
from sdiff_jax.training.trainer import Trainer, initialize_from

__all__ = ["TrainState", "Trainer", "initialize_from"]
