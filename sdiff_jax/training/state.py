"""The state of training, which holds arrays alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdiff_jax.types import Array, Params


class TrainState(NamedTuple):
  """Everything that a step of training reads and writes.

  Attributes:
    step: number of steps so far, int32 scalar.
    params: parameters of the network.
    opt_state: state of the optimizer.
    ema: profile -> averaged parameters.
  """

  step: Array
  params: Params
  opt_state: optax.OptState
  ema: dict[str, Params]


def create(
  params: Params, optimizer: optax.GradientTransformation, profiles: tuple[str, ...]
) -> TrainState:
  """Returns the state before the first step; every average starts at `params`.

  Args:
    params: parameters of the network.
    optimizer: the optimizer.
    profiles: names of the averages, see `ema.betas`.

  Example:
    >>> state = create({"w": jnp.ones(2)}, optax.sgd(0.1), ("power/0.1",))
    >>> int(state.step), state.ema["power/0.1"]["w"].tolist()
    (0, [1.0, 1.0])
  """
  # These are copies because a donated buffer must not be in the state twice.
  averages = {p: jax.tree.map(jnp.copy, params) for p in profiles}
  return TrainState(jnp.int32(0), params, optimizer.init(params), averages)
