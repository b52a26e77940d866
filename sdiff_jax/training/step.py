"""One step of training as a pure function, and its compiled form."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sdiff_jax.distributed import replicas, sharding
from sdiff_jax.kernels import cpu
from sdiff_jax.kernels.layout import row_major
from sdiff_jax.training import ema as ema_lib
from sdiff_jax.training.state import TrainState
from sdiff_jax.types import Array, Batch, LossFn, Metrics, Params, PRNGKey, PyTree

# (state, batch, key, frozen) -> (state, metrics).
Step = Callable[..., tuple[TrainState, Metrics]]
# (params, batch, key, step, frozen) -> a tree of arrays.
Gradient = Callable[..., PyTree]


def build(
  loss: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  ema: Mapping[str, Callable[[Array], Array]] | None = None,
  learning_rate: optax.Schedule | None = None,
  normalize: Callable[[Params], Params] = lambda params: params,
  loss_scale: float = 1.0,
  grad_accum_steps: int = 1,
  grad_dtype: jnp.dtype | None = None,
  trainable: Callable[[Params], PyTree] = lambda params: None,
) -> Step:
  """Returns the step (state, batch, key, frozen) -> (state, metrics).

  Args:
    loss: the loss.
    optimizer: maps gradients to updates.
    ema: profile -> decay of the average at update n, see `ema.betas`.
    learning_rate: step -> learning rate, to log it.
    normalize: applied to the parameters after each update.
    loss_scale: the loss is multiplied by it, and its gradient divided, so that the
      gradient does not underflow in float16.
    grad_accum_steps: number of parts in which a batch is processed, see `accumulated`.
    grad_dtype: replicas add their gradients once a step, in this type, which needs a
      loss of a `replicas.network`; None: where, and in which type, the compiler does.
    trainable: parameters -> which of them the optimizer updates, bools; None for all.

  Returns:
    A pure function. `key` is the key of the run; the number of the step is folded into
    it. The parameters of a teacher are the argument `frozen`; closed over, they would
    be a constant of the program. A step whose loss or gradient is not finite changes
    only the number of steps, and its metric "skipped" is 1.

  Example:
    >>> loss = lambda params, batch, key, step, frozen: (jnp.sum(params["w"] ** 2), {})
    >>> from sdiff_jax.training import state as state_lib
    >>> optimizer = optax.sgd(0.25)
    >>> state = state_lib.create({"w": jnp.ones(2)}, optimizer, ())
    >>> state, metrics = build(loss, optimizer)(state, None, jax.random.key(0), None)
    >>> state.params["w"].tolist()
    [0.5, 0.5]
  """
  decays = ema or {}

  def scaled(params: Params, *args: PyTree) -> tuple[Array, Metrics]:
    value, aux = loss(params, *args)
    return loss_scale * value, aux

  gradient_of: Gradient = jax.value_and_grad(scaled, has_aux=True)
  if grad_accum_steps > 1:
    gradient_of = accumulated(gradient_of, grad_accum_steps)
  if grad_dtype is not None:
    gradient_of = _added_once(gradient_of, grad_dtype)

  def step(
    state: TrainState, batch: Batch, key: PRNGKey, frozen: Params
  ) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(key, state.step)
    (value, aux), grads = gradient_of(state.params, batch, key, state.step, frozen)
    value, grads = jax.tree.map(lambda x: x / loss_scale, (value, grads))
    grads = row_major(grads)
    # optax raises floats to integer powers, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    norm = _norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)

    def if_finite(new: PyTree, old: PyTree) -> PyTree:
      return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    updated = optax.apply_updates(state.params, updates)
    # Guarded before the norms, so that nothing reads the old parameters after them.
    kept = if_finite(updated, state.params)
    params = normalize(kept)
    if params is kept:  # there are no norms
      averaged = updated
    else:
      averaged = params = if_finite(params, kept)
    n = state.step + 1
    averages = ema_lib.update(state.ema, averaged, n, decays, trainable(averaged))
    rest = if_finite((opt_state, averages), (state.opt_state, state.ema))
    new = TrainState(n, params, *rest)
    metrics = {"loss": value, "gradient_norm": norm}
    if learning_rate is not None:
      metrics["learning_rate"] = jnp.asarray(learning_rate(state.step))
    metrics |= {"skipped": jnp.where(finite, 0.0, 1.0), **aux}
    return new, metrics

  return step


def _norm(grads: Params) -> Array:
  """Returns the root of the sum of squares of all gradients.

  Those of one shape are added to each other first, so that they are read by one kernel.
  """
  sums: dict[tuple[Any, ...], Array] = {}
  for g in jax.tree.leaves(grads):
    kind = (g.shape, g.dtype)
    sums[kind] = sums.get(kind, 0.0) + jnp.square(g)
  return jnp.sqrt(sum(jnp.sum(squares) for squares in sums.values()))


def accumulated(gradient_of: Gradient, parts: int) -> Gradient:
  """Returns `gradient_of`, a mean over the batch, computed in equal parts sequentially.

  Part i holds the samples i, i + parts, ..., so that every device holds some of each
  part and no sample moves. Its key is the key of the batch with i folded in. A loss
  without random draws has the same value for every number of parts, up to rounding.

  optax.MultiSteps does not serve: it accumulates over calls of the whole step, whose
  count, averages and keys would advance with every part.

  Args:
    gradient_of: (params, batch, key, step, frozen) -> arrays.
    parts: number of parts, which divides the batch size.

  Example:
    >>> mean = lambda params, batch, key, step, frozen: jnp.mean(batch)
    >>> key = jax.random.key(0)
    >>> float(accumulated(mean, 2)(None, jnp.arange(4.0), key, None, None))
    1.5
  """

  def mean(params: Params, batch: Batch, key: PRNGKey, *rest: PyTree) -> PyTree:
    def split(x: Array) -> Array:
      return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def accumulate(sums: PyTree, part: tuple[Array, Batch]) -> tuple[PyTree, None]:
      i, samples = part
      values = gradient_of(params, samples, jax.random.fold_in(key, i), *rest)
      return jax.tree.map(jnp.add, sums, values), None

    batch = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(gradient_of, params, first, key, *rest)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, _ = jax.lax.scan(accumulate, sums, (jnp.arange(parts), batch))
    return jax.tree.map(lambda x: x / parts, sums)

  return mean


def _added_once(gradient_of: Gradient, dtype: jnp.dtype) -> Gradient:
  """Returns `gradient_of`, whose gradients are added over replicas after all parts."""

  def call(params: Params, *args: PyTree) -> PyTree:
    if replicas.count() == 1:
      return gradient_of(params, *args)
    value, grads = gradient_of(replicas.copies(params), *args)
    return value, replicas.total(grads, dtype)

  return call


def jitted(
  step: Step, mesh: Mesh | None = None, state: PyTree = None, frozen: PyTree = None
) -> jax.stages.Wrapped:
  """Returns `step` under jit, sharded over a mesh, with the state donated.

  Args:
    step: the step (see `build`).
    mesh: the device mesh; None for the first device, where no shapes are needed.
    state: the state or its shapes.
    frozen: parameters of the teacher or their shapes, or None.

  Example:
    >>> mesh = sharding.make_mesh(devices=jax.devices()[:1])
    >>> state = TrainState(jnp.int32(0), {"w": jnp.ones(2)}, (), {})
    >>> callable(jitted(lambda *args: args, mesh, state, None))
    True
  """
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  jit = functools.partial(
    jax.jit, donate_argnums=0, compiler_options=cpu.training_options(device)
  )
  if mesh is None:
    return jit(step)
  state_sharding = sharding.state(state, mesh)
  everywhere = sharding.replicated(mesh)
  return jit(
    sharding.with_mesh(mesh, step),
    in_shardings=(
      state_sharding,
      sharding.batch(mesh),
      everywhere,
      sharding.state(frozen, mesh),
    ),
    out_shardings=(state_sharding, everywhere),
  )
