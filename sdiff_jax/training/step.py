"""One step of training as a pure function, and its compiled form."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sdiff_jax.distributed import sharding
from sdiff_jax.training import ema
from sdiff_jax.training.state import TrainState
from sdiff_jax.types import Array, LossFn, Params, PRNGKey

Step = Callable[..., tuple[TrainState, dict[str, Array]]]


def build(
  loss: LossFn,
  optimizer: optax.GradientTransformation,
  betas: dict[str, Callable[[Array], Array]],
  rate: optax.Schedule,
  normalize: Callable[[Params], Params] = lambda params: params,
  loss_scale: float = 1.0,
  accumulate: int = 1,
) -> Step:
  """Returns (state, batch, key, frozen) -> (state, metrics).

  Args:
    loss: the objective.
    optimizer: turns gradients into updates.
    betas: profile -> decay of the average at update n (see `ema`).
    rate: step -> learning rate, to log it.
    normalize: the network's, applied to the parameters after each update.
    loss_scale: the loss is multiplied by it, and its gradient divided, so that it does
      not vanish in float16 on the way.
    accumulate: parts that a batch goes through the network in, see `accumulated`.

  Returns:
    A pure function. `key` is the run's own; the step's number is folded into it.
    Teacher parameters are the argument `frozen`: closed over, they would be a
    constant of the program. A step whose loss or gradient is not finite changes the
    count alone, and says so in the metric `skipped`.
  """

  def scaled(params: Params, *args: Any) -> tuple[Array, dict[str, Array]]:
    value, aux = loss(params, *args)
    return loss_scale * value, aux

  gradient_of = jax.value_and_grad(scaled, has_aux=True)
  if accumulate > 1:
    gradient_of = accumulated(gradient_of, accumulate)

  def step(
    state: TrainState, batch: dict, key: PRNGKey, frozen: Params
  ) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(key, state.step)
    (value, aux), grads = gradient_of(state.params, batch, key, state.step, frozen)
    value, grads = jax.tree.map(lambda x: x / loss_scale, (value, grads))
    # optax raises floats to integer powers, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = normalize(optax.apply_updates(state.params, updates))
    n = state.step + 1
    averages = ema.update(state.ema, params, n, betas)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(value) & jnp.isfinite(norm)
    new = TrainState(n, params, opt_state, averages)
    old = state._replace(step=n)
    new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    metrics = {
      "loss": value,
      "gradient_norm": norm,
      "learning_rate": jnp.asarray(rate(state.step)),
      "skipped": jnp.where(good, 0.0, 1.0),
      **aux,
    }
    return new, metrics

  return step


def accumulated(gradient_of: Callable[..., Any], parts: int) -> Callable[..., Any]:
  """Returns `gradient_of`, a mean over rows, in equal parts of a batch, one at a time.

  Part i has the rows i, i + parts, ..., so that each device has some and none moves,
  and the key with i folded in: a loss that draws nothing is the same in every number of
  parts, to rounding.

  Args:
    gradient_of: (params, batch, key, step, frozen) -> arrays.
    parts: their number, which divides the rows of the batch.
  """

  def mean(params: Params, batch: dict, key: PRNGKey, *rest: Any) -> Any:
    def split(x: Array) -> Array:
      return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def turn(sums: Any, part: tuple[Array, dict]) -> tuple[Any, None]:
      i, rows = part
      found = gradient_of(params, rows, jax.random.fold_in(key, i), *rest)
      return jax.tree.map(jnp.add, sums, found), None

    batch = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(gradient_of, params, first, key, *rest)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, _ = jax.lax.scan(turn, sums, (jnp.arange(parts), batch))
    return jax.tree.map(lambda x: x / parts, sums)

  return mean


def jitted(step: Step, mesh: Mesh, state: Any, frozen: Any) -> Any:
  """Returns `step` under jit: sharded as `sharding` says, the state donated.

  Args:
    step: of `build`.
    mesh: the device mesh.
    state: abstract state.
    frozen: abstract teacher parameters or None.
  """
  of_state = sharding.state(state, mesh)
  everywhere = sharding.replicated(mesh)
  return jax.jit(
    sharding.with_mesh(mesh, step),
    in_shardings=(
      of_state,
      sharding.batch(mesh),
      everywhere,
      sharding.state(frozen, mesh),
    ),
    out_shardings=(of_state, everywhere),
    donate_argnums=0,
  )
