"""The training state: arrays alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdiff_jax.types import Array, Params


class TrainState(NamedTuple):
  """All that a step of training reads and writes.

  Attributes:
    step: int32 scalar, steps taken.
    params: parameters of the network.
    opt_state: state of the optimiser.
    ema: profile -> averaged parameters.
  """

  step: Array
  params: Params
  opt_state: Any
  ema: dict[str, Params]


def create(
  params: Params, optimizer: optax.GradientTransformation, profiles: tuple[str, ...]
) -> TrainState:
  """Returns the state before the first step; every average starts at `params`."""
  # Copies, since a donated buffer must not be in the state twice.
  averages = {p: jax.tree.map(jnp.copy, params) for p in profiles}
  return TrainState(jnp.int32(0), params, optimizer.init(params), averages)
