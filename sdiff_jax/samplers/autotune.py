"""The window of a parallel sampler that should be fastest, from timings of a network.

The time of a batch is the number of iterations times the time of an iteration. The
former depends on the solver and the tolerance more than on the network, so it is
measured on a mixture of Gaussians; the latter is timed on the network itself.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdiff_jax.distributed import sharding
from sdiff_jax.samplers import _gaussian_mixture
from sdiff_jax.samplers.sampler import Sampler, sample
from sdiff_jax.types import Array, Params

NUM_TIMED = 3  # calls of the network, of which the fastest counts


class WindowEstimate(NamedTuple):
  """The expected cost of a batch with a window.

  Attributes:
    window: solver steps that are evaluated at once.
    num_iterations: expected sequential calls of the denoiser.
    seconds: expected time of a batch.
  """

  window: int
  num_iterations: float
  seconds: float


def autotune_window(
  sampler: Sampler, cost: Callable[[int], float], multiple: int = 1
) -> list[WindowEstimate]:
  """Returns the expected cost of windows, the fastest first.

  Windows grow until the expected time does. The expected number of iterations is that
  of a mixture of Gaussians in 16 dimensions.

  Args:
    sampler: parallel, with any window.
    cost: window -> seconds of a call of the denoiser for a batch, measured.
    multiple: windows are multiples of it.

  Raises:
    ValueError: no multiple fits the number of solver steps.

  Example:
    >>> from sdiff_jax import samplers
    >>> sampler = samplers.build("paraddpm", sigma_d=0.5, steps=8)
    >>> autotune_window(sampler, cost=lambda window: 1.0)[0].window > 4
    True
  """
  steps, estimates = sampler.num_steps, []
  sizes = [n for k in range(2, 10) for n in (2**k, 3 * 2 ** (k - 1))] + [steps]
  for window in sorted({n for n in sizes if n <= steps and n % multiple == 0}):
    iterations = expected_iterations(sampler.replace(window=window))
    estimates.append(WindowEstimate(window, iterations, iterations * cost(window)))
    if estimates[-1].seconds > 1.5 * min(e.seconds for e in estimates):
      break
  if not estimates:
    raise ValueError(
      f"steps: no window of {steps} solver steps divides over {multiple} devices"
    )
  return sorted(estimates, key=lambda estimate: estimate.seconds)


def expected_iterations(sampler: Sampler) -> float:
  """Returns the mean number of sequential calls of the denoiser a sample.

  It is measured on 16 samples of a mixture of Gaussians whose denoiser is known.

  Example:
    >>> from sdiff_jax import samplers
    >>> expected_iterations(samplers.build("ddim", sigma_d=0.5, steps=8))
    8.0
  """
  denoiser = _gaussian_mixture.denoiser(sampler.tableau.sigma_d)

  @jax.jit
  def iterations(seeds: Array) -> Array:
    return sample(sampler, denoiser, seeds, (16,)).num_iterations

  return float(iterations(np.arange(16)).mean())


def time_denoiser(
  mesh: Mesh,
  denoise: Callable[[Params, Array], Array],
  params: Params,
  shape: tuple[int, ...],
  window: int,
) -> float:
  """Returns the seconds of a call of a network for a batch of windows.

  Of several processes it is the slowest one's time, so that all choose alike.

  Args:
    mesh: the devices.
    denoise: (params, x [N, ...]) -> d [N, ...].
    params: of the network.
    shape: of a batch of samples, [B, ...].
    window: states of a sample that are evaluated at once; N = B window.
  """
  count = shape[0] * window
  over = sharding.batch(mesh) if count % mesh.size == 0 else sharding.samples(mesh)

  @functools.partial(jax.jit, out_shardings=over)
  @functools.partial(sharding.with_mesh, mesh)
  def call(params: Params) -> Array:
    x = jnp.zeros((count, *shape[1:]), jnp.float32)
    return denoise(params, jax.lax.with_sharding_constraint(x, over))

  call(params).block_until_ready()
  seconds = []
  for _ in range(NUM_TIMED):
    begin = time.perf_counter()
    call(params).block_until_ready()
    seconds.append(time.perf_counter() - begin)
  return float(sharding.process_max(np.asarray([min(seconds)], np.float32), mesh)[0])
