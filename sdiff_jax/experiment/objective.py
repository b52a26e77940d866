"""The step of training that a config names: its parts, its teacher and its cost."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from sdiff_jax import registry
from sdiff_jax.data import normalizer, pipeline
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.training import ema, optimizers, state, step
from sdiff_jax.training import flops as flops_lib
from sdiff_jax.types import LossFn, Network, Params, UserError


def program(
  config: ml_collections.ConfigDict, network: Network, teacher: Network | None
) -> tuple[Callable, step.Step]:
  """Returns (key, frozen) -> the first state, and the step of training.

  Raises:
    UserError: loss, optimiser or averages refuse their fields.
  """
  rate, optimizer, betas = optimisation(config)
  chosen = loss(config, network, teacher)
  scale, parts = config.train.loss_scale, config.train.grad_accum_steps
  normalize = network.normalize
  train_step = step.build(chosen, optimizer, betas, rate, normalize, scale, parts)

  def init(key: Any, frozen: Params) -> state.TrainState:
    params = start_from(frozen, network.init(key))
    params = network.normalize(experiments.init_extra_params(config, params))
    return state.create(params, optimizer, tuple(config.ema.profiles))

  return init, train_step


def batch_shapes(config: ml_collections.ConfigDict, source: pipeline.Dataset) -> dict:
  """Returns the shapes of a batch, over all processes."""
  size = config.train.batch_size
  return {
    "x0": jax.ShapeDtypeStruct((size, *source.shape), jnp.float32),
    "cond": pipeline.conditions(source, size),
  }


def optimisation(config: ml_collections.ConfigDict) -> tuple:
  """Returns learning rate, optimiser and the decays of the averages."""
  chosen, train = config.optim, config.train
  rate = optimizers.schedule(
    name=chosen.schedule,
    learning_rate=chosen.learning_rate,
    steps=train.steps,
    batch_size=train.batch_size,
    rampup_images=chosen.rampup_images,
    end_lr_fraction=chosen.end_lr_fraction,
    reference_steps=chosen.reference_steps,
  )
  moments = {k: chosen[k] for k in ("name", "b1", "b2", "eps", "weight_decay", "clip")}
  try:
    betas = ema.betas(config.ema.profiles, train.batch_size)
  except ValueError as error:
    raise UserError(str(error)) from error
  return rate, optimizers.build(rate, **moments), betas


def teacher(
  config: ml_collections.ConfigDict, experiment: experiments.Experiment
) -> tuple[Network | None, Params]:
  """Returns the teacher's network and averaged parameters, None where there is none.

  Raises:
    UserError: the objective needs one and there is none, or one of other data.
  """
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
  theirs = workdir_lib.read(workdir)
  same_data = theirs.data.to_dict() == config.data.to_dict()
  if not same_data or theirs.sigma_d != config.sigma_d:
    raise UserError(f"config.teacher.workdir={workdir}: trained on other data")
  scales = workdir_lib.stored_normalizer(workdir), experiment.dataset.normaliser
  if scales[0] and not normalizer.allclose(*scales):
    raise UserError(
      f"config.teacher.workdir={workdir}: its normaliser.npz is not that of the "
      f"episodes in {config.data.path}"
    )
  network = experiments.network(theirs, experiment.dataset)
  profile = theirs.ema.profiles[0]
  averages = workdir_lib.restore_ema(theirs, network, experiment.mesh, workdir, command)
  return network, averages[profile]


def _command(file: str, workdir: str) -> str:
  return f"python -m sdiff_jax.main --config={file} --workdir={workdir}"


def loss(
  config: ml_collections.ConfigDict, network: Network, teacher: Network | None
) -> LossFn:
  """Returns the objective that a config names.

  Raises:
    UserError: it refuses its fields.
  """
  apply = None if teacher is None else teacher.apply
  return registry.build(
    "losses",
    config.loss.to_dict(),
    network=network,
    teacher=apply,
    sigma_d=config.sigma_d,
  )


def start_from(frozen: Params, fresh: Params) -> Params:
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
  source: pipeline.Dataset,
  teacher: Network | None,
  abstract: state.TrainState,
  key: Any,
  frozen: Params,
) -> float:
  """Returns the floating-point operations of one step, over all devices.

  Counted in the lowered program, which counts a loop's body once: a loop over blocks
  is unrolled for it, and attention does without one.
  """
  config = experiments.for_flop_count(config)
  config.train.grad_accum_steps = 1
  if "attention" in config.model:
    config.model.attention = "plain"
  network = experiments.network(config, source)
  _, train_step = program(config, network, teacher)
  batch = batch_shapes(config, source)
  return flops_lib.count_flops(train_step, abstract, batch, key, frozen)
