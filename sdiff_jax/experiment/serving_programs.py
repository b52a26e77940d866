"""The programs of what is served: each sampler at its batch sizes, and to be watched."""

import concurrent.futures
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import samplers
from sdiff_jax.experiment import pipelines
from sdiff_jax.experiment.pipelines import CompiledSampler, Pipeline
from sdiff_jax.samplers import Sampler, SamplingStats
from sdiff_jax.serving import lanes as lanes_lib
from sdiff_jax.serving.lanes import Lane, Rows
from sdiff_jax.serving.models import Key, Listener, Live
from sdiff_jax.types import Array, Params

GUIDANCE = "guidance"


Program = Callable[[Rows], Rows]


class Plan(NamedTuple):
  """A lane that is yet to be compiled.

  Attributes:
    programs: batch size -> function that compiles the program.
    example: one row of inputs.
  """

  programs: dict[int, Callable[[], Program]]
  example: Rows


def plans(
  key: Key,
  sampler: Sampler,
  variants: dict[bool, Pipeline],
  params: Params,
  rows: Callable[..., Rows],
  sizes: list[int],
  fixed: Rows | None = None,
) -> dict[Key, Plan]:
  """Returns what to compile of a sampler, with and without guidance.

  Args:
    key: of the sampler, without guidance.
    sampler: with its window.
    variants: whether samples have a guidance scale -> the pipeline.
    params: of the network.
    rows: of the model.
    sizes: batch sizes.
    fixed: inputs that all samples share.
  """
  made = {}
  for guided, pipeline in variants.items():
    jitted = pipelines.batch_sampler(pipeline, sampler)
    programs = {
      size: functools.partial(_image_program, jitted, params, size, fixed or {})
      for size in sizes
    }
    example = rows(np.zeros(1, np.int32), guidance=1.0 if guided else None)
    made[key._replace(guided=guided)] = Plan(programs, example)
  return made


def _image_program(
  jitted: CompiledSampler, params: Params, size: int, fixed: Rows
) -> Program:
  return functools.partial(_images, jitted.compile(params, size), params, fixed)


def compiled(name: str, plans: dict[Key, Plan]) -> dict[Key, Lane]:
  """Returns the lanes of a model, compiled on all cores, then timed one by one.

  Args:
    name: of the model.
    plans: what to compile.
  """
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    started = {
      key: {size: pool.submit(make) for size, make in plan.programs.items()}
      for key, plan in plans.items()
    }
  lanes = {}
  for key, futures in started.items():
    label = f"{name} {key.sampler}/{key.steps}" + " guided" * key.guided
    label += f" in {key.max_passes}" if key.max_passes else ""
    programs = {size: future.result() for size, future in futures.items()}
    lanes[key] = lanes_lib.timed(label, programs, plans[key].example)
  return lanes


def _images(compiled: CompiledSampler, params: Params, fixed: Rows, rows: Rows) -> Rows:
  """Returns the images of a batch, which of them are finite, and their cost."""
  inputs = {k: v for k, v in rows.items() if k != "seeds"} | fixed
  images, stats = compiled(params, rows["seeds"], inputs)
  finite = ~np.isnan(np.asarray(stats.error))
  return {"images": np.asarray(images), "finite": finite, **cost(stats)}


class _Audience:
  """The callback of compiled programs, which tells whoever listens at present."""

  def __init__(self) -> None:
    self.listener: Listener = lambda begin, denoised: None

  def __call__(self, begin: Array, x: Array, denoised: Array) -> None:
    del x
    self.listener(np.asarray(begin), np.asarray(denoised))


def live(
  key: Key,
  sampler: Sampler,
  variants: dict[bool, Pipeline],
  params: Params,
  rows: Callable[..., Rows],
  fixed: Rows | None = None,
) -> Live:
  """Returns the sampler to be watched, compiled for one sample on one device.

  Args:
    key: of the lane that computes the same, without guidance.
    sampler: with its window.
    variants: whether samples have a guidance scale -> the pipeline.
    params: of the network.
    rows: of the model.
    fixed: inputs that all samples share.
  """
  audience, programs = _Audience(), {}
  for guided, pipeline in variants.items():
    example = rows(np.zeros(1, np.int32), guidance=1.0 if guided else None)
    for window in {sampler.window, 1}:
      run = functools.partial(
        _watched, sampler.replace(window=window), pipeline, audience
      )
      example = {**example, **(fixed or {})}
      lowered = jax.jit(run).lower(pipeline.constants, params, example)
      programs[window, guided] = functools.partial(
        lowered.compile(), pipeline.constants, params
      )

  def watch(window: int, rows: Rows, listener: Listener) -> Rows:
    audience.listener = listener
    try:
      images, finite, stats = programs[window, GUIDANCE in rows](
        {**rows, **(fixed or {})}
      )
      jax.effects_barrier()
    finally:
      audience.listener = lambda begin, denoised: None
    return {"images": np.asarray(images), "finite": np.asarray(finite), **cost(stats)}

  for guided in variants:  # the first call of a program is slow
    example = rows(np.zeros(1, np.int32), guidance=1.0 if guided else None)
    for window in {sampler.window, 1}:
      watch(window, example, lambda begin, denoised: None)
  pipeline = next(iter(variants.values()))
  shape = jax.ShapeDtypeStruct((1, *pipeline.shape), jnp.float32)
  pictures = jax.jit(pipeline.decode).lower(pipeline.constants, params, shape).compile()
  guided = not variants.keys() - {True}
  sequential = Key(samplers.solver_of(sampler.name), sampler.num_steps, guided)
  return Live(
    key=key._replace(guided=guided),
    sequential=sequential,
    window=sampler.window,
    evaluations=sampler.num_steps,
    watch=watch,
    pictures=lambda d: np.asarray(pictures(pipeline.constants, params, d)),
  )


def _watched(
  sampler: Sampler,
  pipeline: Pipeline,
  audience: _Audience,
  constants: Params,
  params: Params,
  rows: dict[str, Array],
) -> tuple[Array, Array, SamplingStats]:
  """Returns images, whether they are finite, and their cost."""
  net, cond = pipeline.denoiser(params, {k: v for k, v in rows.items() if k != "seeds"})
  out = samplers.sample(
    sampler, net, rows["seeds"], pipeline.shape, cond, callback=audience
  )
  images, finite = pipeline.decode_checked(constants, params, out.x)
  finite &= pipelines.finite_samples(out.x)
  return images, finite, SamplingStats(*out[1:-1])


def cost(stats: SamplingStats) -> Rows:
  """Returns what answers say of the cost of their rows.

  Args:
    stats: of samples, arrays [B].
  """
  return {
    "passes": np.asarray(stats.num_iterations),
    "evaluations": np.asarray(stats.num_evaluations),
  }
