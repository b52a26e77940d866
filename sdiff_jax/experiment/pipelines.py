"""From seeds to images by any model: what `sample`, `generate` and `evaluate` share.

A `Pipeline` is a model with its decoder; `batch_sampler` makes it, with a sampler, a
function from seeds to images over the devices of a mesh.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sdiff_jax import samplers
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.samplers import Sampler, SamplingStats, autotune, comparison
from sdiff_jax.types import Array, Cond, Denoiser, Params, UserError

Inputs = dict[str, Array]  # what images are conditioned on, by name


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A model as a function from seeds to images.

  Attributes:
    mesh: the devices; samples are distributed over `data` and `fsdp`.
    shape: of one sample.
    denoiser: (params, inputs with leading [B]) -> denoiser, and its conditions.
    placeholder: params, x [N, *shape] -> d [N, *shape]: a call of the network with
      some conditions, to be timed or counted.
    decode_checked: (constants, params, x [B, *shape]) -> images uint8 [B, H, W, C], and whether
      the decoder's output is finite, bool [B].
    inputs: batch size -> shapes of the inputs.
    input_shardings: of the inputs.
    requests: numbers of images int [B] -> their seeds int32 [B] and inputs.
    constants: parameters beside those of the model, such as an autoencoder's.
    coarse_denoiser: constants -> denoiser of parareal's sequential sweep; None to use
      the same denoiser.
    data: (params, inputs, seeds int32 [B]) -> what the first states are noised versions
      of, [B, *shape]; None to start from noise alone.
    dtype: of the hidden layers, for messages.
  """

  mesh: Mesh
  shape: tuple[int, ...]
  denoiser: Callable[[Params, Inputs], tuple[Denoiser, Cond]]
  placeholder: Callable[[Params, Array], Array]
  decode_checked: Callable[[Params, Params, Array], tuple[Array, Array]]
  inputs: Callable[[int], dict[str, jax.ShapeDtypeStruct]]
  input_shardings: Mapping[str, NamedSharding]
  requests: Callable[[np.ndarray], tuple[np.ndarray, dict[str, np.ndarray]]]
  constants: Params = None
  coarse_denoiser: Callable[[Params], Denoiser] | None = None
  data: Callable[[Params, Inputs, Array], Array] | None = None
  dtype: str = "float32"

  def decode(self, constants: Params, params: Params, x: Array) -> Array:
    """Returns images uint8 [B, H, W, C] of samples x [B, *shape]."""
    return self.decode_checked(constants, params, x)[0]


@dataclasses.dataclass(frozen=True)
class CompiledSampler:
  """A function from seeds to images.

  Attributes:
    fn: (constants, params, seeds int32 [B], inputs) -> images uint8 [B, H, W, C] and
      their SamplingStats, jitted or compiled. The error of samples that are not finite
      is NaN.
    constants: its first argument.
    inputs: batch size -> shapes of the inputs.
    description: of the sampler and of the network's dtype, for messages.
  """

  fn: Any
  constants: Params
  inputs: Callable[[int], dict[str, jax.ShapeDtypeStruct]]
  description: str = ""

  def __call__(
    self, params: Params, seeds: Array, inputs: Inputs
  ) -> tuple[Array, SamplingStats]:
    """Starts a batch; only reading the result waits for the devices."""
    return self.fn(self.constants, params, seeds, inputs)

  def lower(self, params: Params, batch_size: int) -> jax.stages.Lowered:
    """Returns the program for a batch size; parameters may be shapes."""
    seeds = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return self.fn.lower(self.constants, params, seeds, self.inputs(batch_size))

  def compile(self, params: Params, batch_size: int) -> "CompiledSampler":
    """Returns the sampler compiled for a batch size."""
    return dataclasses.replace(self, fn=self.lower(params, batch_size).compile())


def check_finite(
  sampler: CompiledSampler, error: Array, indices: Sequence[int] | np.ndarray
) -> None:
  """Checks that samples are finite, which their pixels do not show.

  Args:
    sampler: that made them.
    error: `SamplingStats.error` of the samples, on this process, [B].
    indices: numbers of the first samples, whose others are padding, int [n].

  Raises:
    UserError: they are not; the message names the sampler, the dtype and the remedy.
  """
  bad = np.isnan(np.asarray(error)[: len(indices)])
  if bad.any():
    raise UserError(
      f"{sampler.description}: {bad.sum()} of {len(indices)} samples are not finite, the "
      f"first of them number {indices[int(bad.argmax())]}, and none of these is written; "
      "check the weights, use more steps or less guidance, or a dtype of a wider range "
      "(float32, or bfloat16 in place of float16)"
    )


def batch_sampler(
  pipeline: Pipeline, sampler: Sampler, *, record: bool = False
) -> CompiledSampler:
  """Returns the function from seeds to images by a sampler, jitted.

  Image k depends on seeds[k] and on row k of the inputs alone, so neither the batch
  size nor the mesh changes it beyond rounding.

  Args:
    pipeline: the model.
    sampler: with its window chosen.
    record: whether the pipeline decodes the states at the times of the solver's grid,
      [B, N + 1, *shape], in place of the samples.

  Raises:
    UserError: the window does not divide over the mesh.
  """
  mesh, over_window = pipeline.mesh, sampler.takes("mesh")
  if over_window:
    with config_errors("config.sampler"):
      sharding.check_window(sampler.window, mesh)

  def generate(
    constants: Params, params: Params, seeds: Array, inputs: Inputs
  ) -> tuple[Array, SamplingStats]:
    net, cond = pipeline.denoiser(params, inputs)
    coarse = None
    if pipeline.coarse_denoiser and sampler.takes("coarse_denoiser"):
      coarse = pipeline.coarse_denoiser(constants)
    out = samplers.sample(
      sampler,
      net,
      seeds,
      pipeline.shape,
      cond,
      x0=None if pipeline.data is None else pipeline.data(params, inputs, seeds),
      mesh=mesh if over_window else None,
      coarse_denoiser=coarse,
      record=record,
    )
    x = out.x if out.states is None else sampler.tableau.of_grid(out.states)
    images, finite = pipeline.decode_checked(constants, params, x)
    stats = SamplingStats(*out[1:-1])
    finite = finite & finite_samples(x)
    return images, stats._replace(error=jnp.where(finite, stats.error, jnp.nan))

  over_samples = sharding.samples(mesh)
  jitted = jax.jit(
    sharding.with_mesh(mesh, generate),
    in_shardings=(None, None, over_samples, dict(pipeline.input_shardings)),
    out_shardings=over_samples,
  )
  description = (
    f"sampler {sampler.name!r} of {sampler.num_steps} steps, network of dtype "
  )
  description += pipeline.dtype
  return CompiledSampler(jitted, pipeline.constants, pipeline.inputs, description)


def finite_samples(x: Array) -> Array:
  """Returns which samples of x [B, ...] are finite, bool [B]."""
  return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


def start_batch(
  pipeline: Pipeline, sampler: CompiledSampler, params: Params, indices: np.ndarray
) -> tuple[Array, SamplingStats]:
  """Starts the images of some numbers, distributed over the mesh's sample axes.

  Only reading the result waits for the devices.

  Args:
    pipeline: the model.
    sampler: of the pipeline, jitted or compiled for len(indices).
    params: of the model.
    indices: numbers of the images, int [B], the same on every process.
  """
  where = sharding.samples(pipeline.mesh), dict(pipeline.input_shardings)
  seeds, inputs = sharding.device_put_global(pipeline.requests(indices), where)
  return sampler(params, seeds, inputs)


def batches(
  pipeline: Pipeline,
  sampler: CompiledSampler,
  params: Params,
  num: int,
  batch_size: int,
  field: str = "sample.batch_size",
  start: int = 0,
) -> Iterator[tuple[np.ndarray, SamplingStats]]:
  """Yields images 0 to num, uint8 [n, H, W, C], and their stats on the host.

  Args:
    pipeline: the model.
    sampler: of the pipeline, jitted or compiled for the batch size.
    params: of the model.
    num: number of images in all.
    batch_size: images a call; the last batch is filled up, then cut.
    field: config field of the batch size, for the error.
    start: number of images that are left out at the start, whole batches.

  Raises:
    UserError: the batch size does not divide over the mesh, or samples are not finite.
  """
  with config_errors("config"):
    sharding.check_batch(batch_size, sharding.samples(pipeline.mesh), name=field)
  for first in range(start, num, batch_size):
    indices = np.arange(first, first + batch_size)
    batch = start_batch(pipeline, sampler, params, indices)
    batch = jax.device_put(batch, sharding.replicated(pipeline.mesh))
    count = min(batch_size, num - first)
    check_finite(sampler, batch[1].error, indices[:count])
    yield jax.tree.map(lambda x, count=count: np.asarray(x)[:count], batch)


def with_window(
  mesh: Mesh,
  sampler: Sampler,
  denoise: Callable[[Params, Array], Array],
  params: Params,
  shape: tuple[int, ...],
) -> Sampler:
  """Returns the sampler with a window: its own, or the fastest one by timings.

  The choice is the same on every process, and is reported on stderr.

  Args:
    mesh: the devices.
    sampler: the sampler; if it has no window yet, the network is timed.
    denoise: (params, x [N, ...]) -> d [N, ...], as `Pipeline.placeholder`.
    params: of the network.
    shape: of a batch of samples, [B, ...].

  Raises:
    UserError: no window divides over the mesh.
  """
  if not sampler.is_parallel or sampler.window:
    return sampler
  cost = functools.partial(autotune.time_denoiser, mesh, denoise, params, shape)
  with config_errors("config.sampler"):
    best = autotune.autotune_window(sampler, cost, mesh.shape["window"])[0]
  steps, one = sampler.num_steps, cost(1)
  if jax.process_index() == 0:
    print(
      f"window={best.window}: about {best.num_iterations:.1f} iterations, "
      f"{best.seconds:.2g} s a batch; sequential sampling needs {steps} evaluations, "
      f"{steps * one:.2g} s",
      file=sys.stderr,
    )
  return sampler.replace(window=best.window)


def describe(sampler: Sampler, stats: SamplingStats) -> str:
  """Returns the cost and the accuracy of images in words.

  Args:
    sampler: that made them.
    stats: of the images, arrays [N].
  """
  line = f"{np.mean(stats.num_evaluations):.4g} evaluations each"
  if not sampler.is_parallel:
    return line
  line += f" in {np.mean(stats.num_iterations):.4g} iterations"
  line += f", {sampler.num_steps} in sequential sampling"
  if sampler.fact("exact"):
    return f"{line}; the distribution is that of the sequential sampler"
  line += f"; largest accepted change {np.max(stats.error):.2g}"
  if sampler.fact("bounds_tv") and sampler.tableau.uses_noise:
    bound = np.mean(stats.tv_bound)
    known = "bound is vacuous (>= 1)" if bound >= 1 else f"at most {bound:.2g}"
    line += f", total variation {known}"
  return line


def report_comparison(
  pipeline: Pipeline,
  sampler: Sampler,
  compiled: CompiledSampler,
  params: Params,
  indices: np.ndarray,
) -> None:
  """Prints the time of a batch beside the sequential sampler's, and the difference.

  Args:
    pipeline: the model.
    sampler: the sampler.
    compiled: the sampler, compiled for the batch.
    params: of the model.
    indices: numbers of the images of the batch.
  """
  sequential = batch_sampler(pipeline, sampler.sequential())
  sequential = sequential.compile(params, len(indices))

  def images(sampler: CompiledSampler) -> np.ndarray:
    batch = start_batch(pipeline, sampler, params, indices)
    batch, stats = jax.device_put(batch, sharding.replicated(pipeline.mesh))
    check_finite(sampler, stats.error, indices)
    return np.asarray(batch)

  timing = comparison.time_with_sequential(
    functools.partial(images, compiled), functools.partial(images, sequential)
  )
  if jax.process_index() == 0:
    print(
      f"a batch of {len(indices)}: {timing.seconds:.3g} s; sequential sampling "
      f"{timing.sequential_seconds:.3g} s "
      f"({timing.sequential_seconds / timing.seconds:.2f}x); images differ by "
      f"{timing.rms_difference:.3g} of 255 levels",
      file=sys.stderr,
    )
