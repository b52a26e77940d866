"""Training from Python, without a config: first state, compiled step, plain loop."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sdiff_jax.distributed import sharding
from sdiff_jax.training import state as state_lib
from sdiff_jax.training import step as step_lib
from sdiff_jax.training.state import TrainState
from sdiff_jax.types import (
  Array,
  Batch,
  LossFn,
  Metrics,
  Network,
  Params,
  PRNGKey,
  PyTree,
)


def _identity(params: Params) -> Params:
  return params


def _all(params: Params) -> PyTree:
  del params


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
  """A loss, a network and an optimizer as a step of training.

  The trainer holds no arrays: the state, the batch, the key and the parameters of a
  teacher are arguments of its methods.

  Attributes:
    loss: the loss; its network is `network`.
    network: the network to train.
    optimizer: maps gradients to updates.
    ema: profile -> decay of the average at update n, see `ema.betas`; {} for none.
    learning_rate: schedule of the optimizer, to log it; None for no log.
    mesh: devices over which batch and state are sharded, see
      `distributed.sharding.make_mesh`; None for the default device.
    loss_scale: factor of the loss during backpropagation, so that gradients do not
      underflow in float16; the gradients are divided by it.
    grad_accum_steps: number of equal parts in which the network processes a batch.
    grad_dtype: type in which replicas add their gradients once a step; see `step.build`.
    init_extra_params: maps the parameters of the network to those that are trained, for
      losses with further networks (`losses.Facts`).
    trainable: maps parameters to which of them the optimizer updates, bools; None for
      all.

  Example:
    >>> import optax
    >>> from sdiff_jax.losses import diffusion
    >>> from sdiff_jax.types import Network
    >>> network = Network(
    ...   init=lambda key: {"net": jnp.float32(0.5), "logvar": jnp.float32(0.0)},
    ...   apply=lambda params, x, t, cond, *, key=None: params["net"] * x,
    ...   logvar=lambda params, t: params["logvar"] * t,
    ... )
    >>> loss = diffusion.build(network=network, sigma_d=0.5)
    >>> trainer = Trainer(loss, network, optax.sgd(0.1))
    >>> state = trainer.init(jax.random.key(0))
    >>> batch = {"x0": jnp.ones((4, 2)), "cond": None}
    >>> state, metrics = trainer.step(state, batch, jax.random.key(1))
    >>> int(state.step), sorted(metrics)
    (1, ['gradient_norm', 'loss', 'mse', 'skipped'])
  """

  loss: LossFn
  network: Network
  optimizer: optax.GradientTransformation
  _: dataclasses.KW_ONLY
  ema: Mapping[str, Callable[[Array], Array]] = dataclasses.field(default_factory=dict)
  learning_rate: optax.Schedule | None = None
  mesh: Mesh | None = None
  loss_scale: float = 1.0
  grad_accum_steps: int = 1
  grad_dtype: jnp.dtype | None = None
  init_extra_params: Callable[[Params], Params] = _identity
  trainable: Callable[[Params], PyTree] = _all

  @functools.cached_property
  def update(self) -> step_lib.Step:
    """The step as a pure function (state, batch, key, frozen) -> (state, metrics).

    It can be used inside other transformations, such as `jax.lax.scan`. See `step`.
    """
    return step_lib.build(
      self.loss,
      self.optimizer,
      ema=self.ema,
      learning_rate=self.learning_rate,
      normalize=self.network.normalize,
      loss_scale=self.loss_scale,
      grad_accum_steps=self.grad_accum_steps,
      grad_dtype=self.grad_dtype,
      trainable=self.trainable,
    )

  def create_state(self, key: PRNGKey, init_from: Params | None = None) -> TrainState:
    """Returns the first state, as a pure function; see `init`."""
    params = self.network.init(key)
    if init_from is not None:
      params = initialize_from(init_from, params)
    params = self.network.normalize(self.init_extra_params(params))
    return state_lib.create(params, self.optimizer, tuple(self.ema))

  def abstract_state(self) -> TrainState:
    """Returns shapes, types and, on a mesh, shardings of the state."""
    return self._abstract_state

  @functools.cached_property
  def _abstract_state(self) -> TrainState:
    abstract: TrainState = jax.eval_shape(self.create_state, jax.random.key(0))
    if self.mesh is not None:
      abstract = sharding.abstract_state(abstract, self.mesh)
    return abstract

  def init(self, key: PRNGKey, init_from: Params | None = None) -> TrainState:
    """Returns the first state, before any update.

    Args:
      key: random key of the initial parameters.
      init_from: parameters of a trained network, {"net": ..., ...}, that the network
        starts from (see `initialize_from`); None for random ones.

    Returns:
      The state, sharded over the mesh.

    Raises:
      ValueError: `init_from` is of another network.
    """
    shardings = None
    if self.mesh is not None:
      shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
    create = jax.jit(self.create_state, out_shardings=shardings)
    state: TrainState = create(key, init_from)
    return state

  def lower(
    self, state: TrainState, batch: Batch, key: PRNGKey, frozen: Params = None
  ) -> jax.stages.Lowered:
    """Returns the step lowered for arrays of these shapes, to compile it ahead of time.

    Args:
      state: arrays or their shapes; so are the others.
      batch: see `step`.
      key: see `step`.
      frozen: see `step`.
    """
    lowered: jax.stages.Lowered = self._jit(state, frozen).lower(
      state, batch, key, frozen
    )
    return lowered

  def step(
    self, state: TrainState, batch: Batch, key: PRNGKey, frozen: Params = None
  ) -> tuple[TrainState, Metrics]:
    """Returns the state after one update, and the metrics of the step.

    The function is compiled at its first call.

    Args:
      state: the state. Its memory is reused, so it must not be read afterwards.
      batch: {"x0": [B, ...], "cond": Cond}.
      key: random key of the whole run; the number of the step is folded into it.
      frozen: parameters of the teacher, or None.

    Returns:
      The new state, and a dict of scalars: "loss", "gradient_norm", "learning_rate",
      "skipped" (1 where loss or gradient were not finite and the parameters were
      kept), and the metrics of the loss.
    """
    structure = jax.tree.structure((state, frozen))
    if structure not in self._compiled:
      self._compiled[structure] = self._jit(state, frozen)
    return self._compiled[structure](state, batch, key, frozen)

  @functools.cached_property
  def _compiled(self) -> dict[PyTree, step_lib.Step]:
    return {}

  def _jit(self, state: TrainState, frozen: Params) -> jax.stages.Wrapped:
    return step_lib.jitted(self.update, self.mesh, state, frozen)

  def fit(
    self,
    state: TrainState,
    batches: Iterator[Batch],
    key: PRNGKey,
    *,
    steps: int,
    frozen: Params = None,
  ) -> tuple[TrainState, Metrics]:
    """Runs `step` on the next batches.

    A run with checkpoints and logs is `loop.run`.

    Args:
      state: the first state; it must not be read afterwards.
      batches: batches on the device, see `step`.
      key: random key of the run.
      steps: number of steps, at least 1.
      frozen: parameters of the teacher, or None.

    Returns:
      The last state, and the metrics of all steps, [steps] each.
    """
    log = []
    for _ in range(steps):
      state, metrics = self.step(state, next(batches), key, frozen)
      log.append(metrics)
    return state, jax.tree.map(lambda *values: jnp.stack(values), *log)


def initialize_from(source: Params, fresh: Params) -> Params:
  """Returns the parameters of a network that starts from a trained one.

  Parameters that only the new network has, such as those of the embedding of a further
  condition, stay fresh. So does w_phi(t), which weights the error of another loss.

  Args:
    source: parameters of the trained network, {"net": ..., ...}.
    fresh: initial parameters of the new network, {"net": ..., "logvar": ...}, and
      "lora" for one with adapters.

  Returns:
    Parameters with the structure of `fresh`; the arrays are copies.

  Raises:
    ValueError: an array has another shape, or the new network lacks one.

  Example:
    >>> fresh = {"net": {"w": jnp.zeros(2), "b": jnp.zeros(1)}, "logvar": jnp.zeros(1)}
    >>> params = initialize_from({"net": {"w": jnp.ones(2)}}, fresh)
    >>> params["net"]["w"].tolist(), params["net"]["b"].tolist()
    ([1.0, 1.0], [0.0])
  """
  remaining = dict(jax.tree.leaves_with_path(source["net"]))

  def merge(path: PyTree, leaf: jax.Array) -> jax.Array:
    array = remaining.pop(path, leaf)
    if array.shape != leaf.shape:
      raise ValueError(
        f"init_from: another network: {jax.tree_util.keystr(path)} has shape "
        f"{array.shape}, here {leaf.shape}"
      )
    return jnp.copy(array)

  net = jax.tree.map_with_path(merge, fresh["net"])
  if remaining:
    name = jax.tree_util.keystr(next(iter(remaining)))
    raise ValueError(f"init_from: another network: this one has no {name}")
  return fresh | {"net": net}
