"""What a parallel sampler takes, and how far it ends from one row after the other."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sdiff_jax.samplers import sampler, sequential
from sdiff_jax.samplers.sampler import Sampler
from sdiff_jax.samplers.solvers import SolverTableau
from sdiff_jax.types import Array, Cond, Denoiser, Params, PRNGKey


class SamplingStats(NamedTuple):
  """Means over samples.

  Attributes:
    passes: calls of the denoiser that wait for one another.
    evaluations: states that the denoiser was evaluated at.
    error: of the last state, a root mean square over that of the sequential one.
  """

  passes: float
  evaluations: float
  error: float


def sweep(
  bound: Callable[[Params], Denoiser],
  params: Params,
  table: SolverTableau,
  x: Array,
  keys: PRNGKey,
  cond: Cond,
  *,
  sharding: NamedSharding | None = None,
) -> Callable[[Sampler, Iterable[float]], Iterator[SamplingStats]]:
  """Returns (plan of that table, tolerances) -> what each takes, one after the other.

  Args:
    bound: params -> denoiser.
    params: of the denoiser.
    table: the solver.
    x: first state, [B, ...].
    keys: one key a sample, [B].
    cond: conditions, leading [B].
    sharding: of the axes [B, window]; None on one device.
  """

  @jax.jit
  def alone(params: Params) -> Array:
    return sequential.sample(bound(params), table, x, keys, cond)

  truth = np.asarray(alone(params)).reshape(len(x), -1)

  def error(found: Array) -> float:
    off = np.asarray(found).reshape(len(x), -1) - truth
    return float(np.mean(np.sqrt(np.mean(off**2, 1) / np.mean(truth**2, 1))))

  def of(plan: Sampler, tolerances: Iterable[float]) -> Iterator[SamplingStats]:
    @jax.jit
    def run(params: Params, tolerance: Array) -> sampler.Result:
      chosen = plan._replace(tolerance=tolerance)
      return sampler.run(chosen, bound(params), x, keys, cond, sharding=sharding)

    for tolerance in tolerances:
      result = run(params, jnp.float32(tolerance))
      means = (float(n.mean()) for n in (result.passes, result.evaluations))
      yield SamplingStats(*means, error(result.x))

  return of
