"""Times of samplers: the window that should be fastest, one sampler beside another."""

import functools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdiff_jax.distributed import sharding
from sdiff_jax.samplers import sampler
from sdiff_jax.samplers.sampler import Sampler
from sdiff_jax.types import Array, Params, UserError

TIMED = 3  # calls of the network, of which the fastest counts


def window(
  chosen: Sampler,
  mesh: Mesh,
  denoise: Callable[[Params, Array], Array],
  params: Params,
  shape: tuple[int, ...],
) -> Sampler:
  """Returns the plan with a window: its own, or the one that timings say.

  Args:
    chosen: the plan.
    mesh: the devices.
    denoise: (params, x [N, ...]) -> d [N, ...], which is timed.
    params: of the network.
    shape: of a batch of samples, [B, ...].

  Raises:
    UserError: no window fits the mesh.
  """
  if not chosen.loop or chosen.window:
    return chosen
  cost = functools.partial(_seconds, mesh, denoise, params, shape)
  try:
    tried = sampler.autotune_window(chosen, cost, mesh.shape["window"])
  except ValueError as error:
    raise UserError(f"config.{error}") from error
  best, rows = tried[0], chosen.table.evaluations
  alone = rows * cost(1)
  if jax.process_index() == 0:
    print(
      f"window {best.window}: about {best.passes:.1f} passes, {best.seconds:.2g} s a "
      f"batch; one row after the other {rows} and {alone:.2g} s",
      file=sys.stderr,
    )
  return chosen._replace(window=best.window)


def _seconds(
  mesh: Mesh,
  denoise: Callable[[Params, Array], Array],
  params: Params,
  shape: tuple[int, ...],
  window: int,
) -> float:
  """Returns the time of a call of the network for a batch of windows."""
  count = shape[0] * window
  spread = sharding.batch(mesh) if count % mesh.size == 0 else sharding.samples(mesh)

  @functools.partial(jax.jit, out_shardings=spread)
  @functools.partial(sharding.with_mesh, mesh)
  def call(params: Params) -> Array:
    x = jnp.zeros((count, *shape[1:]), jnp.float32)
    return denoise(params, jax.lax.with_sharding_constraint(x, spread))

  call(params).block_until_ready()
  seconds = []
  for _ in range(TIMED):
    begin = time.perf_counter()
    call(params).block_until_ready()
    seconds.append(time.perf_counter() - begin)
  # The slowest process's, so that all choose alike.
  return float(sharding.process_max(np.float32([min(seconds)]), mesh)[0])


def compare_with_sequential(
  mesh: Mesh, size: int, chosen: Callable[[], Array], alone: Callable[[], Array]
) -> str:
  """Returns a line on a batch beside the sequential sampler's: times, difference.

  Args:
    mesh: the devices.
    size: images of the batch.
    chosen: () -> images uint8 [B, H, W, C], compiled.
    alone: the same one row after the other.
  """
  images, seconds = [], []
  for each in (chosen, alone):
    begin = time.perf_counter()
    everywhere = sharding.replicated(mesh)
    images.append(np.asarray(jax.device_put(each(), everywhere)).astype(np.float64))
    seconds.append(time.perf_counter() - begin)
  off = np.sqrt(np.mean((images[0] - images[1]) ** 2))
  return (
    f"a batch of {size}: {seconds[0]:.3g} s; one row after the other "
    f"{seconds[1]:.3g} s ({seconds[1] / seconds[0]:.2f}x); images "
    f"differ by {off:.3g} of 255 levels"
  )
