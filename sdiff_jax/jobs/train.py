"""Job `train`: trains a network from a config, or goes on where it stopped."""

import json
import os
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview

from sdiff_jax import config as config_lib
from sdiff_jax import registry
from sdiff_jax.data import pipeline
from sdiff_jax.distributed import processes, sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import objective, sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.io import file_io, image_io
from sdiff_jax.samplers.sampler import Sampler
from sdiff_jax.training import loop, metric_writer, state, step
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.types import Params, UserError

DEFAULTS = {
  "train": {
    "steps": config_lib.not_negative(1000),
    "batch_size": config_lib.positive(128),  # over all devices
    # Parts of a batch that go through the network one after another; more parts need
    # less memory.
    "grad_accum_steps": config_lib.positive(1),
    # Factor of the loss, by which the gradients are divided again: the mean over a
    # batch and all pixels is too small for float16.
    "loss_scale": config_lib.positive(1.0),
    "flip": False,  # mirror images horizontally with probability 1/2
    "log_every": config_lib.positive(50),  # steps
    "sample_every": config_lib.not_negative(0),  # steps between sample grids; 0: none
    "skip_nonfinite": False,  # skip steps with a NaN or an infinity, instead of stopping
  }
}


@registry.register(
  "jobs",
  "train",
  defaults=DEFAULTS,
  runtime=("train.log_every", "train.sample_every", "train.skip_nonfinite"),
  creates_workdir=True,
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Trains into `workdir`, and returns a line that says what came of it.

  Raises:
    UserError: a field, the teacher or the work directory does not fit.
  """
  experiment = experiments.build(config)
  size, parts = config.train.batch_size, config.train.grad_accum_steps
  with config_errors("config.train"):
    sharding.check_batch(size, sharding.batch(experiment.mesh), parts)
  if config.train.sample_every:
    sampling.check_images(experiment)
  _check_conditions(config, experiment.dataset)
  chosen = sampling.plan(config)
  network, frozen = objective.teacher(config, experiment)
  init, train_step = objective.program(config, experiment.network, network)
  workdir_lib.save_or_check_config(config, workdir, experiment.dataset)
  everywhere = sharding.replicated(experiment.mesh)
  key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=everywhere)()
  abstract = jax.eval_shape(init, key, frozen)
  placed = workdir_lib.abstract_with_sharding(abstract, experiment.mesh)
  jitted = step.jitted(train_step, experiment.mesh, abstract, frozen)
  kept = {k: config.checkpoint[k] for k in ("keep", "keep_every")}
  with Checkpoints(workdir, **kept) as checkpoints:
    current = checkpoints.restore(placed)
    if current is None or current.step < config.train.steps:
      steps, every = config.train.steps, config.checkpoint.every
      checkpoints.check_disk(abstract, [*range(every, steps, every), steps])
    if current is None:
      shardings = jax.tree.map(lambda x: x.sharding, placed)
      current = jax.jit(init, out_shardings=shardings)(key, frozen)
    start = int(current.step)
    if start < config.train.steps:
      done = _fit(
        config,
        experiment,
        chosen,
        workdir,
        checkpoints,
        jitted,
        current,
        key,
        frozen,
        start,
      )
      if done < config.train.steps:
        return f"stopped at step {done}, the same command goes on: {workdir}"
    # A run that was killed after its last step has no summary yet.
    if start < config.train.steps or not os.path.exists(_summary_path(workdir)):
      if network:  # as its operations are counted
        theirs = experiments.for_flop_count(workdir_lib.read(config.teacher.workdir))
        network = experiments.network(theirs, experiment.dataset)
      cost = objective.flops(config, experiment.dataset, network, abstract, key, frozen)
      _summary(config, workdir, abstract, cost)
  return f"trained {config.train.steps} steps: {workdir}"


def _fit(
  config: ml_collections.ConfigDict,
  experiment: experiments.Experiment,
  chosen: Sampler,
  workdir: str,
  checkpoints: Checkpoints,
  jitted: Any,
  current: state.TrainState,
  key: Any,
  frozen: Params,
  start: int,
) -> int:
  """Runs the loop from `start`, and returns the steps taken in all."""
  mesh = experiment.mesh
  over_batch, size = sharding.batch(mesh), config.train.batch_size
  batches = pipeline.batches(
    experiment.dataset,
    seed=config.seed,
    batch_size=size,
    sigma_d=config.sigma_d,
    start=start,
    flip=config.train.flip,
    rows=sharding.rows(over_batch, size),
  )
  on_device = (sharding.make_global_batch(batch, over_batch, size) for batch in batches)
  shapes = objective.batch_shapes(config, experiment.dataset)
  compiled = jitted.lower(current, shapes, key, frozen).compile()
  call = None
  if config.train.sample_every:
    call = sampling.sampler(config, experiment, chosen._replace(loop=""))
  profile = config.ema.profiles[0]

  def sample(current: state.TrainState) -> np.ndarray:
    num, columns = sampling.grid_size(experiment)
    batch_size = -(-num // mesh.size) * mesh.size
    made = sampling.generate(
      config, experiment, call, current.ema[profile], num=num, batch_size=batch_size
    )
    return image_io.grid(next(made)[0], columns)

  earlier = [
    r["seconds"] for r in metric_writer.read_metrics(workdir) if r["step"] <= start
  ]
  active, steps = jax.process_index() == 0, config.train.steps
  with (
    metric_writer.Writer(workdir, total=steps, start=start, active=active) as metrics,
    processes.sigterm() as stopping,
  ):
    state_after = loop.run(
      lambda current, batch: compiled(current, batch, key, frozen),
      current,
      on_device,
      metrics,
      checkpoints,
      start=start,
      steps=steps,
      batch_size=size,
      log_every=config.train.log_every,
      save_every=config.checkpoint.every,
      sample_every=config.train.sample_every,
      sample=sample,
      skip_nonfinite=config.train.skip_nonfinite,
      stopping=stopping,
      seconds=earlier[-1] if start and earlier else 0.0,
    )
  return int(state_after.step)


def _check_conditions(
  config: ml_collections.ConfigDict, source: pipeline.Dataset
) -> None:
  """Raises a UserError if a field needs images or labels, and the data have none."""
  if not source.observation:
    return
  guided = config.loss.get("guidance") or config.model.get("guidance")
  for field, value in (("train.flip", config.train.flip), ("loss.guidance", guided)):
    if value:
      raise UserError(
        f"config.{field}={value}: for images; config.data are trajectories"
      )


def _summary_path(workdir: str) -> str:
  return os.path.join(workdir, "training.json")


def _summary(
  config: ml_collections.ConfigDict,
  workdir: str,
  abstract: state.TrainState,
  flops: float,
) -> None:
  """Writes training.json, what the run cost, and parameters.txt, what it trained."""
  if jax.process_index():
    return
  overview = parameter_overview.get_parameter_overview(
    abstract.params, include_stats=False
  )
  file_io.write_text(os.path.join(workdir, "parameters.txt"), overview + "\n")
  steps = config.train.steps
  parameters = sum(x.size for x in jax.tree.leaves(abstract.params["net"]))
  summary = {
    "steps": steps,
    "images": steps * config.train.batch_size,
    "seconds": metric_writer.read_metrics(workdir)[-1]["seconds"],
    "parameters": parameters,
    "flops": flops * steps,
  }
  file_io.write_text(_summary_path(workdir), json.dumps(summary, indent=2))
