"""Training of a small network on data whose flow map is known, in one program."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdiff_jax.training import ema, optimizers, state, step
from sdiff_jax.types import Array, LossFn, Network, Params, PRNGKey


def train(
  loss: LossFn,
  network: Network,
  draw: Callable[[PRNGKey], Array],
  *,
  steps: int = 3000,
  batch: int = 256,
  learning_rate: float = 3e-3,
  b1: float = 0.9,
  init_extra_params: Callable[[Params], Params] = lambda params: params,
) -> Params:
  """Returns the averaged parameters after training on x0 = draw(key), [batch, ...]."""
  optimizer = optimizers.build(
    lambda step: learning_rate * (1 - step / steps),
    name="adam",
    b1=b1,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.0,
    clip=0.0,
  )
  profile = "power/0.1"
  train_step = step.build(loss, optimizer, ema=ema.betas((profile,), batch))

  # It runs for longer than it compiles, unlike most programs of tests.
  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
  def run(start):
    def body(now, _):
      x0 = draw(jax.random.fold_in(jax.random.key(2), now.step))
      return train_step(now, {"x0": x0, "cond": {}}, jax.random.key(1), None)[0], None

    return jax.lax.scan(body, start, None, length=steps)[0]

  params = init_extra_params(network.init(jax.random.key(0)))
  start = state.create(params, optimizer, (profile,))
  return run(start).ema[profile]


def rms(error: Array) -> float:
  """Returns the root mean square of an array."""
  return float(jnp.sqrt(jnp.mean(jnp.square(error))))
