"""Job `train`: trains a network from a config, or goes on where it stopped."""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from clu import parameter_overview

from sdiff_jax import (
  ema,
  lookup,
  loop,
  optim,
  processes,
  roofline,
  sharding,
  state,
  step,
  writer,
)
from sdiff_jax.checkpoint import Checkpoints
from sdiff_jax.data import normaliser, pipeline
from sdiff_jax.interfaces import Network, Params, UserError
from sdiff_jax.jobs import experiment as experiments
from sdiff_jax.jobs import sampling
from sdiff_jax.samplers.plans import Plan


def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Trains into `workdir`, and returns a line that says what came of it.

  Raises:
    UserError: a field, the teacher or the work directory does not fit.
  """
  experiment = experiments.build(config)
  size, parts = config.train.batch_size, config.train.accumulate
  sharding.check_batch(size, sharding.batch(experiment.mesh), "train.batch_size", parts)
  if config.train.sample_every:
    sampling.check_images(experiment)
  _check_conditions(config, experiment.source)
  chosen = sampling.plan(config)
  network, frozen = teacher(experiment)
  init, train_step = program(config, experiment.network, network)
  experiments.claim(config, workdir, experiment.source)
  everywhere = sharding.replicated(experiment.mesh)
  key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=everywhere)()
  abstract = jax.eval_shape(init, key, frozen)
  placed = experiments.place(abstract, experiment.mesh)
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
        experiment, chosen, workdir, checkpoints, jitted, current, key, frozen, start
      )
      if done < config.train.steps:
        return f"stopped at step {done}, the same command goes on: {workdir}"
    # A run that was killed after its last step has no summary yet.
    if start < config.train.steps or not os.path.exists(_summary_path(workdir)):
      if network:  # as its operations are counted
        theirs = experiments.unrolled(experiments.read(config.teacher.workdir))
        network = experiments.network(theirs, experiment.source)
      cost = flops(config, experiment.source, network, abstract, key, frozen)
      _summary(config, workdir, abstract, cost)
  return f"trained {config.train.steps} steps: {workdir}"


def _fit(
  experiment: experiments.Experiment,
  chosen: Plan,
  workdir: str,
  checkpoints: Checkpoints,
  jitted: Any,
  current: state.TrainState,
  key: Any,
  frozen: Params,
  start: int,
) -> int:
  """Runs the loop from `start`, and returns the steps taken in all."""
  config, mesh = experiment.config, experiment.mesh
  over_batch, size = sharding.batch(mesh), config.train.batch_size
  batches = pipeline.batches(
    experiment.source,
    seed=config.seed,
    batch_size=size,
    sigma_d=config.sigma_d,
    start=start,
    flip=config.train.flip,
    rows=sharding.rows(over_batch, size),
  )
  on_device = (sharding.put(batch, over_batch, size) for batch in batches)
  shapes = batch_shapes(config, experiment.source)
  compiled = jitted.lower(current, shapes, key, frozen).compile()
  call = None
  if config.train.sample_every:
    call = sampling.sampler(experiment, chosen._replace(loop=""))
  profile = config.ema.profiles[0]

  def sample(current: state.TrainState) -> np.ndarray:
    num, columns = sampling.grid_size(experiment)
    batch_size = -(-num // mesh.size) * mesh.size
    made = sampling.generate(
      experiment, call, current.ema[profile], num=num, batch_size=batch_size
    )
    return writer.grid(next(made)[0], columns)

  earlier = [r["seconds"] for r in writer.read_metrics(workdir) if r["step"] <= start]
  active, steps = jax.process_index() == 0, config.train.steps
  with (
    writer.Writer(workdir, total=steps, start=start, active=active) as metrics,
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
  config: ml_collections.ConfigDict, source: pipeline.Source
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


def program(
  config: ml_collections.ConfigDict, network: Network, teacher: Network | None
) -> tuple[Callable, step.Step]:
  """Returns (key, frozen) -> the first state, and the step of training.

  Raises:
    UserError: loss, optimiser or averages refuse their fields.
  """
  rate, optimizer, betas = optimisation(config)
  loss = _loss(config, network, teacher)
  scale, parts = config.train.loss_scale, config.train.accumulate
  train_step = step.build(loss, optimizer, betas, rate, network.normalize, scale, parts)

  def init(key: Any, frozen: Params) -> state.TrainState:
    params = _start_from(frozen, network.init(key))
    params = network.normalize(experiments.grow(config, params))
    return state.create(params, optimizer, tuple(config.ema.profiles))

  return init, train_step


def batch_shapes(config: ml_collections.ConfigDict, source: pipeline.Source) -> dict:
  """Returns the shapes of a batch, over all processes."""
  size = config.train.batch_size
  return {
    "x0": jax.ShapeDtypeStruct((size, *source.shape), jnp.float32),
    "cond": pipeline.conditions(source, size),
  }


def optimisation(config: ml_collections.ConfigDict) -> tuple:
  """Returns learning rate, optimiser and the decays of the averages."""
  chosen, train = config.optim, config.train
  rate = optim.schedule(
    name=chosen.schedule,
    learning_rate=chosen.learning_rate,
    steps=train.steps,
    batch_size=train.batch_size,
    rampup_images=chosen.rampup_images,
    final=chosen.final,
    reference_steps=chosen.reference_steps,
  )
  moments = {k: chosen[k] for k in ("name", "b1", "b2", "eps", "weight_decay", "clip")}
  try:
    betas = ema.betas(config.ema.profiles, train.batch_size)
  except ValueError as error:
    raise UserError(str(error)) from error
  return rate, optim.build(rate, **moments), betas


def teacher(experiment: experiments.Experiment) -> tuple[Network | None, Params]:
  """Returns the teacher's network and averaged parameters, None where there is none.

  Raises:
    UserError: the objective needs one and there is none, or one of other data.
  """
  config = experiment.config
  workdir, file = config.teacher.workdir, config.teacher.config
  if not workdir:
    if not experiments.takes_teacher(config):
      return None, None
    raise UserError(
      "config.teacher.workdir is empty: name the run that this one starts from, "
      f"trained by: {_command(file or 'configs/..._diffusion.py', 'DIR')}"
    )
  command = _command(file, workdir)
  if not os.path.exists(os.path.join(workdir, "config.json")):
    raise UserError(f"config.teacher.workdir={workdir}: no run there; first: {command}")
  theirs = experiments.read(workdir)
  same_data = theirs.data.to_dict() == config.data.to_dict()
  if not same_data or theirs.sigma_d != config.sigma_d:
    raise UserError(f"config.teacher.workdir={workdir}: trained on other data")
  scales = experiments.stored_normaliser(workdir), experiment.source.normaliser
  if scales[0] and not normaliser.alike(*scales):
    raise UserError(
      f"config.teacher.workdir={workdir}: its normaliser.npz is not that of the "
      f"episodes in {config.data.path}"
    )
  network = experiments.network(theirs, experiment.source)
  profile = theirs.ema.profiles[0]
  there = experiment._replace(config=theirs, network=network)
  return network, experiments.averages(there, workdir, command)[profile]


def _command(file: str, workdir: str) -> str:
  return f"python -m sdiff_jax.main --config={file} --workdir={workdir}"


def _loss(
  config: ml_collections.ConfigDict, network: Network, teacher: Network | None
) -> Any:
  apply = None if teacher is None else teacher.apply
  return lookup.build(
    "losses",
    config.loss.to_dict(),
    network=network,
    teacher=apply,
    sigma_d=config.sigma_d,
  )


def _start_from(frozen: Params, fresh: Params) -> Params:
  """Returns the teacher's parameters with what only the student has from `fresh`.

  w_phi starts fresh: it weighs another error.

  Raises:
    UserError: the two networks differ in more than the student's extra inputs.
  """
  if frozen is None:
    return fresh
  theirs = dict(jax.tree.leaves_with_path(frozen["net"]))

  def merge(path: Any, leaf: jax.Array) -> jax.Array:
    found = theirs.pop(path, leaf)
    if found.shape != leaf.shape:
      name = jax.tree_util.keystr(path)
      raise UserError(
        f"config.model is not the teacher's: {name} is {leaf.shape}, the teacher's "
        f"{found.shape}"
      )
    return jnp.copy(found)

  net = jax.tree.map_with_path(merge, fresh["net"])
  if theirs:
    name = jax.tree_util.keystr(next(iter(theirs)))
    raise UserError(f"config.model is not the teacher's: it has no {name}")
  return {"net": net, "logvar": fresh["logvar"]}


def flops(
  config: ml_collections.ConfigDict,
  source: pipeline.Source,
  teacher: Network | None,
  abstract: state.TrainState,
  key: Any,
  frozen: Params,
) -> float:
  """Returns the floating-point operations of one step, over all devices.

  Counted in the lowered program, which counts a loop's body once: a loop over blocks
  is unrolled for it, and attention does without one.
  """
  config = experiments.unrolled(config)
  config.train.accumulate = 1
  if "attention" in config.model:
    config.model.attention = "plain"
  network = experiments.network(config, source)
  _, train_step = program(config, network, teacher)
  batch = batch_shapes(config, source)
  return roofline.operations(train_step, abstract, batch, key, frozen)


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
  writer.save_text(os.path.join(workdir, "parameters.txt"), overview + "\n")
  steps = config.train.steps
  parameters = sum(x.size for x in jax.tree.leaves(abstract.params["net"]))
  summary = {
    "steps": steps,
    "images": steps * config.train.batch_size,
    "seconds": writer.read_metrics(workdir)[-1]["seconds"],
    "parameters": parameters,
    "flops": flops * steps,
  }
  writer.save_text(_summary_path(workdir), json.dumps(summary, indent=2))
