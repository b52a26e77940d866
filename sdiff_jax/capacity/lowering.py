"""Programs of abstract arrays, and the compiler's analysis of them."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdiff_jax.capacity import hlo
from sdiff_jax.capacity import kernels as kernels_lib
from sdiff_jax.capacity.kernels import Kernel
from sdiff_jax.distributed import sharding
from sdiff_jax.samplers import Sampler, autotune
from sdiff_jax.training import flops as flops_lib
from sdiff_jax.training.state import TrainState
from sdiff_jax.training.trainer import Trainer
from sdiff_jax.types import Array, Json, Params, PRNGKey, PyTree


class Program(NamedTuple):
  """A program of abstract arrays.

  Attributes:
    lower: () -> the program, lowered for the devices of its mesh.
    flops: (remat) -> number of operations over all devices, with or without those that
      rematerialization repeats in the backward pass.
    persistent_bytes: kind of array -> bytes on one device that persist between calls.
    num_parameters: of the network.
    num_images: that one batch generates, or that one training step uses.
    trip_count: of the loop whose body the compiler's counts include once (microbatches
      of a batch).
    calls_per_batch: runs of the program for one batch (evaluations of a sampler, or the
      expected number of parallel iterations).
    checkpoint_bytes: of a checkpoint of the training, 0 for samples.
  """

  lower: Callable[[], jax.stages.Lowered]
  flops: Callable[[bool], float]
  persistent_bytes: dict[str, int]
  num_parameters: int
  num_images: int
  trip_count: int
  calls_per_batch: float
  checkpoint_bytes: int = 0

  def summary(self) -> dict[str, Json]:
    """Returns the numbers of a program that need no compiler."""
    names = ("num_parameters", "num_images", "calls_per_batch", "checkpoint_bytes")
    return {name: getattr(self, name) for name in names}


def training_step(
  trainer: Trainer,
  mesh: Mesh,
  state: TrainState,
  batch: dict[str, PyTree],
  key: PRNGKey,
  frozen: Params,
  flops: Callable[[bool], float],
) -> Program:
  """Returns the program of a training step.

  Args:
    trainer: whose step is lowered.
    mesh: its devices.
    state: shapes of the training state; so are the others.
    batch: {"x0": [B, ...], "cond": ...}.
    key: random key of the run.
    frozen: parameters of the teacher, None without one.
    flops: (remat) -> number of operations of a step over all devices, see `Program`.
  """
  of_state = sharding.state(state, mesh)
  return Program(
    lower=lambda: trainer.lower(state, batch, key, frozen),
    flops=flops,
    persistent_bytes={
      "parameters": bytes_per_device(state.params, of_state.params),
      "optimizer": bytes_per_device(state.opt_state, of_state.opt_state),
      "EMA": bytes_per_device(state.ema, of_state.ema),
      "teacher": bytes_per_device(frozen, sharding.state(frozen, mesh)),
      "batch": bytes_per_device(batch, sharding.batch(mesh)),
    },
    num_parameters=sum(x.size for x in jax.tree.leaves(state.params)),
    num_images=batch["x0"].shape[0],
    trip_count=trainer.grad_accum_steps,
    calls_per_batch=1.0,
    checkpoint_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
  )


def sampling(
  batch_sampler: jax.stages.Wrapped,
  sampler: Sampler,
  evaluate: Callable[[Params, Array], Array],
  params: Params,
  *,
  shape: tuple[int, ...],
  batch_size: int,
) -> Program:
  """Returns the program of a batch of samples, whose loop is counted once.

  Args:
    batch_sampler: jitted function of parameters and the batch size (static).
    sampler: that it runs, with a window.
    evaluate: params, x [N, *shape] -> denoised [N, *shape]; its operations are counted.
    params: shapes of the parameters, with their shardings.
    shape: of a sample.
    batch_size: number of samples.

  Raises:
    ValueError: the sampler has no window.
  """
  if not sampler.window:
    raise ValueError("window=0: must be set, since no device can be timed")
  x = jax.ShapeDtypeStruct((batch_size * sampler.window, *shape), jnp.float32)
  weights = jax.tree.leaves(params)
  return Program(
    lower=lambda: batch_sampler.lower(params, batch_size),
    flops=lambda remat: flops_lib.count_flops(evaluate, params, x),
    persistent_bytes={
      "parameters": bytes_per_device(params, [w.sharding for w in weights])
    },
    num_parameters=sum(w.size for w in weights),
    num_images=batch_size,
    trip_count=1,
    calls_per_batch=autotune.expected_iterations(sampler),
  )


def bytes_per_device(tree: PyTree, shardings: PyTree) -> int:
  """Returns the bytes of arrays that one device holds."""
  leaves = jax.tree.leaves(tree)
  if isinstance(shardings, jax.sharding.Sharding):
    places = [shardings] * len(leaves)
  else:
    places = jax.tree.leaves(shardings)
  return sum(
    int(np.prod(s.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
    for x, s in zip(leaves, places, strict=True)
  )


def analyze(
  program: Program,
  lowered: jax.stages.Lowered,
  num_devices: int,
  *,
  gpu: bool = False,
) -> dict[str, Json]:
  """Compiles a program and returns its facts.

  Args:
    program: the program.
    lowered: its lowered form, `program.lower()`.
    num_devices: of its mesh.
    gpu: whether it is compiled for GPUs.

  Returns:
    For one device: `memory` (bytes of arguments, temporaries, outputs, program, peak),
    `flops`, `kernels` (each different one, see `kernels.distinct`), `collectives`. For
    all devices: `model_flops`. If the program does not fit, `error` is the compiler's
    message instead.
  """
  begin, cpu = time.monotonic(), time.process_time()
  facts = {"model_flops": program.flops(False)}
  options = {"xla_gpu_autotune_level": 0} if gpu else {}
  try:
    compiled = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return facts | {"error": " ".join(str(error).split())[:400]}
  facts |= read(compiled)
  if facts["flops"] is None or program.trip_count > 1:
    facts["flops"] = program.flops(True) / num_devices
  found = [Kernel(**k) for k in facts["kernels"]]
  # The compiler counts the body of a loop once, kernels (products alone) as often as it
  # runs.
  own = facts["model_flops"] / num_devices
  facts["flops"] = max(facts["flops"], own, kernels_lib.flops(found))
  if any(k.kind == "custom" for k in found):
    found = kernels_lib.with_custom(found, program.flops(True) / num_devices)
  facts["kernels"] = [k._asdict() for k in found]
  facts["compile_seconds"] = time.monotonic() - begin
  facts["compile_cpu_seconds"] = time.process_time() - cpu
  return facts


def read(compiled: jax.stages.Compiled) -> dict[str, Json]:
  """Returns the compiler's analysis of a program, see `analyze`."""
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  text = compiled.as_text()
  return {
    "memory": {
      "arguments": memory.argument_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
      "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
      "program": memory.generated_code_size_in_bytes,
      "peak": memory.peak_memory_in_bytes,
    },
    "flops": cost.get("flops"),
    "kernels": [k._asdict() for k in kernels_lib.distinct(kernels_lib.read(text))],
    "collectives": [c._asdict() for c in hlo.read(text)],
  }
