"""Programs of the other jobs on abstract arrays, and the facts of their compiled form."""

import os
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from sdiff_jax import config as configs
from sdiff_jax import registry
from sdiff_jax.capacity import hlo
from sdiff_jax.data import Dataset, PixelCodec, class_cond
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import pipelines, sampling, text_to_image
from sdiff_jax.experiment import training as training_lib
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.experiment.pipelines import Pipeline
from sdiff_jax.samplers import Sampler, autotune
from sdiff_jax.training import flops as flops_lib
from sdiff_jax.types import Json, Network, Params, PyTree, UserError

KINDS = ("train", "sample")
NO_WINDOW = "config.sampler.window=0: must be set, since no device can be timed"


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
  """

  lower: Callable[[], jax.stages.Lowered]
  flops: Callable[[bool], float]
  persistent_bytes: dict[str, int]
  num_parameters: int
  num_images: int
  trip_count: int
  calls_per_batch: float

  def summary(self) -> dict[str, Json]:
    """Returns the numbers of a program that need no compiler."""
    names = ("num_parameters", "num_images", "calls_per_batch")
    return {name: getattr(self, name) for name in names}


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Program:
  """Returns the program that config.rehearse.program names.

  Raises:
    UserError: the batch does not divide over the mesh, or a piece refuses its fields.
  """
  if config.job == "generate":
    return generated(config, mesh)
  config, source = experiments.model_variant(config, "unrolled"), source_of(config)
  experiment = experiments.Experiment(
    source,
    experiments.network(config, source),
    mesh,
    config.sigma_d,
    bool(config.model.get("guidance", False)),
  )
  kind = {"train": training, "sample": sampled}[config.rehearse.program]
  return kind(config, experiment)


def source_of(config: ml_collections.ConfigDict) -> Dataset:
  """Returns the data set, or one without images if config.rehearse.shape is set."""
  if not config.rehearse.shape:
    return registry.build("data", config.data.to_dict(), "config.data")
  classes = class_cond(config.rehearse.classes)
  return Dataset(_no_data, 0, classes, PixelCodec(tuple(config.rehearse.shape)))


def _no_data(indices: np.ndarray) -> NoReturn:
  raise ValueError("rehearse.shape: names a shape alone; there are no data")


def training(
  config: ml_collections.ConfigDict, experiment: experiments.Experiment
) -> Program:
  """Returns the training step."""
  source, network, mesh = experiment.dataset, experiment.network, experiment.mesh
  size = config.train.batch_size
  parts = config.train.grad_accum_steps
  with config_errors("config.train"):
    sharding.check_batch(size, sharding.batch(mesh), parts)
  taught, frozen = teacher(config, source)
  trainer = training_lib.build_trainer(config, network, taught, mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(trainer.create_state, key)
  batch = training_lib.batch_shapes(source, size)

  def flops(remat: bool) -> float:
    plain = config if remat else experiments.model_variant(config, "without_remat")
    return training_lib.step_flops(plain, source, taught, state, key, frozen)

  of_state = sharding.state(state, mesh)
  persistent_bytes = {
    "parameters": bytes_per_device(state.params, of_state.params),
    "optimizer": bytes_per_device(state.opt_state, of_state.opt_state),
    "EMA": bytes_per_device(state.ema, of_state.ema),
    "teacher": bytes_per_device(frozen, sharding.state(frozen, mesh)),
    "batch": bytes_per_device(batch, sharding.batch(mesh)),
  }
  return Program(
    lower=lambda: trainer.lower(state, batch, key, frozen),
    flops=flops,
    persistent_bytes=persistent_bytes,
    num_parameters=sum(x.size for x in jax.tree.leaves(state.params)),
    num_images=size,
    trip_count=parts,
    calls_per_batch=1.0,
  )


def sampled(
  config: ml_collections.ConfigDict, experiment: experiments.Experiment
) -> Program:
  """Returns the program of a batch of samples of a network trained here.

  Raises:
    UserError: the batch or the window does not divide over the mesh, or there is no
      window.
  """
  everywhere = sharding.replicated(experiment.mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    jax.eval_shape(experiment.network.init, key),
  )
  pipeline = sampling.pipeline(config, experiment)
  return _sampling_program(config, pipeline, sampling.build_sampler(config), params)


def generated(config: ml_collections.ConfigDict, mesh: Mesh) -> Program:
  """Returns the program of a batch of samples by a model of the diffusers format.

  Only the config files of its folder are read. The decoder is left out, since it runs
  once, and the U-Net in every iteration.

  Raises:
    UserError: the batch or the window does not divide over the mesh, or there is no
      window, or the folder does not fit.
  """
  model, sampler = text_to_image.from_config(config, abstract=True)
  weights = {k: v for k, v in model.params.items() if k != "vae"}
  model = model._replace(vae=None, params=weights)
  pipeline = text_to_image.pipeline(
    model, sampler, mesh, guidance_scale=config.sample.guidance
  )
  params = text_to_image.params_with_sharding(model, mesh)
  return _sampling_program(config, pipeline, sampler, params)


def _sampling_program(
  config: ml_collections.ConfigDict,
  pipeline: Pipeline,
  sampler: Sampler,
  params: Params,
) -> Program:
  """Returns the program of a batch, whose loop over iterations is counted once."""
  size = config.sample.batch_size
  with config_errors("config.sample"):
    sharding.check_batch(size, sharding.samples(pipeline.mesh))
  if not sampler.window:
    raise UserError(NO_WINDOW)
  compiled = pipelines.batch_sampler(pipeline, sampler)
  x = jax.ShapeDtypeStruct((size * sampler.window, *pipeline.shape), jnp.float32)
  weights = jax.tree.leaves(params)
  return Program(
    lower=lambda: compiled.lower(params, size),
    flops=lambda remat: flops_lib.count_flops(pipeline.placeholder, params, x),
    persistent_bytes={
      "parameters": bytes_per_device(params, [w.sharding for w in weights])
    },
    num_parameters=sum(w.size for w in weights),
    num_images=size,
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


def _teacher_config(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict | None:
  """Returns the config of the teacher's run, or of its file if there is no run yet.

  The dtype of a teacher from a file is that of the student.
  """
  file, workdir = config.teacher.config, config.teacher.workdir
  if not training_lib.needs_teacher(config):
    return None
  if os.path.exists(os.path.join(workdir, "config.json")):
    return experiments.model_variant(workdir_lib.read(workdir), "unrolled")
  theirs = configs.load(
    file, f"config.teacher.config={file!r}: no such file, and no run there"
  )
  if "dtype" in theirs.model and "dtype" in config.model:
    theirs.model.dtype = config.model.dtype
  return experiments.model_variant(theirs, "unrolled")


def teacher(
  config: ml_collections.ConfigDict, source: Dataset
) -> tuple[Network | None, Params]:
  """Returns the teacher's network and abstract parameters, None where there is none."""
  theirs = _teacher_config(config)
  if theirs is None:
    return None, None
  network = experiments.network(theirs, source)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return network, jax.eval_shape(network.init, key)


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
    `flops`, `bytes` of memory traffic (None if the compiler does not report it),
    `collectives`. For all devices: `model_flops`. If the program does not fit, `error`
    is the compiler's message instead.
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
  if facts["bytes"] is not None:
    facts["bytes"] *= program.trip_count
  facts["compile_seconds"] = time.monotonic() - begin
  facts["compile_cpu_seconds"] = time.process_time() - cpu
  return facts


def read(compiled: jax.stages.Compiled) -> dict[str, Json]:
  """Returns the compiler's analysis of a program, see `analyze`."""
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  collectives = hlo.read(compiled.as_text())
  return {
    "memory": {
      "arguments": memory.argument_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
      "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
      "program": memory.generated_code_size_in_bytes,
      "peak": memory.peak_memory_in_bytes,
    },
    "flops": cost.get("flops"),
    "bytes": cost.get("bytes accessed"),
    "collectives": [c._asdict() for c in collectives],
  }
