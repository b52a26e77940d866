"""Consistency mid-training: regression on the states of a teacher's trajectories.

CMT (arXiv:2509.24526) trains a few-step model, before its own training or in place of it,
to map a state of a trajectory of the teacher's probability flow to the trajectory's end:
no tangent, no constant copy of the network. Trajectories start at noise, so neither data nor
noised data are needed. The paper's perceptual distance (LPIPS) and its weights are left
out: the distance is the mean square, with the adaptive weight of the other losses.
"""

import functools
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import registry
from sdiff_jax.diffusion import guidance as cfg
from sdiff_jax.diffusion import trigflow
from sdiff_jax.fields import Choices, Positive, Range
from sdiff_jax.losses import _velocity, _weighting
from sdiff_jax.losses._velocity import GuidanceRange, TeacherFn
from sdiff_jax.samplers import sequential, solvers
from sdiff_jax.samplers.tableau import SolverTableau
from sdiff_jax.types import (
  Array,
  Batch,
  Cond,
  CondSpec,
  Denoiser,
  LossFn,
  Metrics,
  NetFn,
  Network,
  Params,
  PRNGKey,
)

# The condition of a batch of stored trajectories: the times t and s of its states.
TIMES = "trajectory_times"


class Pairs(NamedTuple):
  """Pairs of states of trajectories.

  Attributes:
    xt: states at times t, [B, ...].
    xs: states of the same trajectories at times s, [B, ...].
    t: TrigFlow times, [B].
    s: TrigFlow times, [B], s < t.
    cond: conditions of the trajectories, leading [B].
  """

  xt: Array
  xs: Array
  t: Array
  s: Array
  cond: Cond


def residual(net: NetFn, pairs: Pairs, *, sigma_d: float, end_time: bool) -> Array:
  """Returns (f(x_t, t, s) - x_s) / sigma_d, [B, ...], 0 at the true map.

  f(x, t, s) = cos(t - s) x - sin(t - s) sigma_d F(x / sigma_d, t, s).

  Args:
    net: network with its parameters bound.
    pairs: of states.
    sigma_d: standard deviation of the data.
    end_time: whether the network is a flow map, which is given s.

  Example:
    >>> x, t = jnp.ones((1, 2)), jnp.ones(1)
    >>> pairs = Pairs(x, 0 * x, t, 0 * t, None)
    >>> net = lambda x, t, cond: x / jnp.tan(1.0)
    >>> residual(net, pairs, sigma_d=0.5, end_time=False).tolist()
    [[0.0, 0.0]]
  """
  cond = trigflow.with_end_time(pairs.cond, pairs.s) if end_time else pairs.cond
  F = net(pairs.xt / sigma_d, pairs.t, cond)
  f = trigflow.rotate(pairs.xt, F, pairs.t, pairs.s, sigma_d)
  return (f - pairs.xs) / sigma_d


def grid_pairs(
  key: PRNGKey,
  states: Array,
  grid: np.ndarray,
  cond: Cond,
  batch: int,
  *,
  to_data: bool,
) -> Pairs:
  """Returns pairs of states, each state but the last of a trajectory the first of one.

  Args:
    key: random key of the times s.
    states: of n trajectories, [n, N + 1, ...].
    grid: their times, descending to 0, [N + 1].
    cond: conditions of the trajectories, leading [n].
    batch: number B of pairs, at most n N.
    to_data: whether s = 0; otherwise s is drawn among the times after t.

  Example:
    >>> states = jnp.arange(3.0).reshape(1, 3, 1)
    >>> grid = np.array([1.5, 0.5, 0.0])
    >>> pairs = grid_pairs(jax.random.key(0), states, grid, None, 2, to_data=True)
    >>> pairs.xt.ravel().tolist(), pairs.xs.ravel().tolist(), pairs.t.tolist()
    ([0.0, 1.0], [2.0, 2.0], [1.5, 0.5])
  """
  last = len(grid) - 1
  row, i = jnp.divmod(jnp.arange(batch), last)
  j = (
    jnp.full(batch, last)
    if to_data
    else jax.random.randint(key, (batch,), i + 1, last + 1)
  )
  times = jnp.asarray(grid, states.dtype)
  cond = jax.tree.map(lambda value: value[row], cond)
  return Pairs(states[row, i], states[row, j], times[i], times[j], cond)


def stored_pairs(batch: Batch) -> Pairs:
  """Returns the pairs of a batch of stored trajectories.

  Args:
    batch: its x0 holds x_t and x_s, [B, 2, ...], and its condition `TIMES` t and s,
      [B, 2].

  Example:
    >>> batch = {"x0": jnp.ones((3, 2, 5)), "cond": {TIMES: jnp.ones((3, 2))}}
    >>> stored_pairs(batch).xt.shape
    (3, 5)
  """
  cond = dict(batch["cond"])
  times, x = cond.pop(TIMES), batch["x0"]
  return Pairs(x[:, 0], x[:, 1], times[:, 0], times[:, 1], cond)


@registry.register(
  "losses",
  "cmt",
  title="CMT",
  description="The model is trained on the states of its teacher's trajectories.",
  family="consistency",
  needs_teacher=True,
  takes_trajectories=True,
  cond=lambda fields: (
    {trigflow.END_TIME: CondSpec((), "float32")} if fields["flow_map"] else {}
  ),
)
def build(
  *,
  network: Network,
  sigma_d: Positive,
  teacher: TeacherFn,
  solver: Annotated[str, Choices(solvers.names)] = "dpmpp2m",
  steps: Annotated[int, Range(1, 1000)] = 16,
  flow_map: bool = False,
  adaptive_weight: bool = True,
  guidance: GuidanceRange = (),
) -> LossFn:
  """Returns E[e^w |f(x_t, t, s) - x_s|^2 / (sigma_d^2 D) - w] over trajectories.

  A batch of stored trajectories gives the pairs (x_t, x_s). For a batch of data, whose
  conditions alone are used, as many trajectories are drawn as make a batch of their
  states, so that the teacher is evaluated about once for each of them.

  Args:
    network: the network to train; with flow_map it has the condition "end_time".
    sigma_d: standard deviation of the data.
    teacher: the teacher network.
    solver: of the trajectories that are drawn, without noise; stored ones have their own.
    steps: of that solver.
    flow_map: whether the network is a flow map, for which s is any later time of the
      trajectory; otherwise s = 0.
    adaptive_weight: whether w = w_phi(t) is learned; otherwise w = 0.
    guidance: (low, high) scales of classifier-free guidance of the trajectories that are
      drawn, () for none.

  Returns:
    A LossFn that logs "mse".

  Raises:
    ValueError: the solver adds noise, or the scales are none.

  Example:
    >>> network = Network(
    ...   init=lambda key: jnp.float32(0.5),
    ...   apply=lambda params, x, t, cond, *, key=None: params * x,
    ...   logvar=lambda params, t: params * t,
    ... )
    >>> loss = build(network=network, sigma_d=0.5, teacher=network.apply, steps=4)
    >>> batch = {"x0": jnp.ones((4, 2)), "cond": {}}
    >>> params, key = network.init(None), jax.random.key(0)
    >>> value, metrics = loss(params, batch, key, jnp.int32(0), params)
    >>> value.shape, sorted(metrics)
    ((), ['mse'])
  """
  _velocity.check_guidance(guidance)
  tableau = solvers.build(sigma_d=sigma_d, name=solver, steps=steps)
  if tableau.uses_noise or tableau.uses_noise_before:
    raise ValueError(f"solver={solver!r}: adds noise, and a trajectory has none")
  velocity_of = _velocity.ode_field(teacher, sigma_d=sigma_d)

  def drawn_pairs(batch: Batch, key: PRNGKey, frozen: Params) -> Pairs:
    x0, last = batch["x0"], len(tableau.grid) - 1
    count, (key_z, key_s, key_v) = -(-len(x0) // last), jax.random.split(key, 3)
    cond = jax.tree.map(lambda value: value[:count], batch["cond"])
    cond = cfg.sample_scale(key_v, jnp.zeros(count), cond, tuple(guidance))

    def net(x: Array, t: Array, cond: Cond) -> Array:
      return velocity_of(frozen, x, x, sigma_d * x, t, cond) / sigma_d

    denoiser = trigflow.denoiser(net, sigma_d)
    states = _trajectories(denoiser, tableau, key_z, x0[:count], cond)
    states = jax.lax.stop_gradient(states)
    return grid_pairs(key_s, states, tableau.grid, cond, len(x0), to_data=not flow_map)

  def loss(
    params: Params, batch: Batch, key: PRNGKey, step: Array, frozen: Params
  ) -> tuple[Array, Metrics]:
    del step
    key_pairs, key_dropout = jax.random.split(key)
    is_stored = TIMES in (batch["cond"] or {})
    pairs = stored_pairs(batch) if is_stored else drawn_pairs(batch, key_pairs, frozen)
    net = functools.partial(network.apply, params, key=key_dropout)
    error = residual(net, pairs, sigma_d=sigma_d, end_time=flow_map)
    w = network.logvar(params, pairs.t) if adaptive_weight else None
    weighted, mse = _weighting.adaptive(error, w)
    return jnp.mean(weighted), {"mse": jnp.mean(mse)}

  return loss


def _trajectories(
  denoiser: Denoiser,
  tableau: SolverTableau,
  key: PRNGKey,
  like: Array,
  cond: Cond,
) -> Array:
  """Returns states of trajectories from noise, [n, N + 1, ...], at the times of the grid.

  The loop is unrolled, because operations inside a loop are counted once.
  """
  x = tableau.init_std * jax.random.normal(key, like.shape, like.dtype)
  keys = jax.random.split(key, len(x))
  states = sequential.states(
    denoiser, tableau, x, keys, cond, unroll=tableau.evaluations
  )
  return tableau.of_grid(jnp.moveaxis(states, 0, 1))
