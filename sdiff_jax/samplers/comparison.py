"""Parallel samplers compared with the sequential sampler of the same solver."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdiff_jax.samplers._samples import Samples
from sdiff_jax.samplers.sampler import Sampler, sample
from sdiff_jax.types import Array, Cond, Denoiser, Params


class Cost(NamedTuple):
  """The cost and the error of a sampler, as means over samples.

  Attributes:
    num_iterations: sequential calls of the denoiser.
    num_evaluations: states that the denoiser was evaluated at.
    error: root mean square difference of a sample to the sequential sampler's, over
      the root mean square of the latter.
  """

  num_iterations: float
  num_evaluations: float
  error: float


class Timing(NamedTuple):
  """A batch of images made by a sampler and by the sequential one.

  Attributes:
    seconds: time of the sampler.
    sequential_seconds: time of the sequential sampler.
    rms_difference: root mean square difference of the images, in 1/255.
  """

  seconds: float
  sequential_seconds: float
  rms_difference: float


def sweep(
  denoiser_of: Callable[[Params], Denoiser],
  params: Params,
  sampler: Sampler,
  seeds: Array,
  shape: tuple[int, ...],
  cond: Cond = None,
  *,
  mesh: Mesh | None = None,
) -> Callable[..., Iterator[Cost]]:
  """Returns a function that measures samplers against the sequential one.

  Args:
    denoiser_of: params -> denoiser.
    params: of the denoiser.
    sampler: gives the solver; its loop does not matter.
    seeds: integers, [B].
    shape: of one sample.
    cond: conditions, leading [B].
    mesh: devices of parallel samplers; None for one device.

  Returns:
    (sampler with the same solver, tolerances=()) -> the cost at each tolerance, or,
    without tolerances, of the sampler as it is.
  """

  seeds = jnp.asarray(seeds)

  @jax.jit
  def sequential(params: Params, seeds: Array, cond: Cond) -> Array:
    return sample(sampler.sequential(), denoiser_of(params), seeds, shape, cond).x

  reference = np.asarray(sequential(params, seeds, cond)).reshape(len(seeds), -1)

  def error(x: Array) -> float:
    difference = np.asarray(x).reshape(len(seeds), -1) - reference
    squares = np.mean(difference**2, 1) / np.mean(reference**2, 1)
    return float(np.mean(np.sqrt(squares)))

  def measure(other: Sampler, tolerances: Iterable[float] = ()) -> Iterator[Cost]:
    over = mesh if other.takes("mesh") else None

    @jax.jit
    def run(
      params: Params, seeds: Array, cond: Cond, changed: dict[str, Array]
    ) -> Samples:
      run_by, denoiser = other.replace(**changed), denoiser_of(params)
      return sample(run_by, denoiser, seeds, shape, cond, mesh=over)

    for changed in [{"tolerance": t} for t in tolerances] or [{}]:
      samples = run(params, seeds, cond, jax.tree.map(jnp.float32, changed))
      iterations, evaluations = (float(n.mean()) for n in samples[1:3])
      yield Cost(iterations, evaluations, error(samples.x))

  return measure


def time_with_sequential(
  parallel: Callable[[], np.ndarray], sequential: Callable[[], np.ndarray]
) -> Timing:
  """Returns the times of a batch by two samplers, and the difference of the images.

  Args:
    parallel: () -> images uint8 [B, H, W, C] on the host, compiled already.
    sequential: the same by the sequential sampler.

  Example:
    >>> images = np.zeros((2, 4, 4, 1), np.uint8)
    >>> time_with_sequential(lambda: images, lambda: images + 1).rms_difference
    1.0
  """
  images, seconds = [], []
  for call in (parallel, sequential):
    begin = time.perf_counter()
    images.append(call().astype(np.float64))
    seconds.append(time.perf_counter() - begin)
  difference = np.sqrt(np.mean((images[0] - images[1]) ** 2))
  return Timing(seconds[0], seconds[1], float(difference))
