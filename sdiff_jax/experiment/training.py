"""From a config to a Trainer: optimizer, loss, FLOPs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from sdiff_jax import losses, registry
from sdiff_jax.data import Dataset, teacher_trajectories
from sdiff_jax.diffusion import trigflow
from sdiff_jax.distributed import replicas, sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import teachers
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.io import file_io
from sdiff_jax.models.layers import lora
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.training import ema, flops, optimizers, state
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.training.state import TrainState
from sdiff_jax.training.trainer import Trainer
from sdiff_jax.types import (
  Json,
  LossFn,
  Network,
  Params,
  PRNGKey,
  UserError,
)


class Optimization(NamedTuple):
  """How parameters are updated and averaged.

  Attributes:
    learning_rate: step -> learning rate.
    optimizer: maps gradients to updates.
    ema: profile -> decay of the average at update n.
  """

  learning_rate: optax.Schedule
  optimizer: optax.GradientTransformation
  ema: dict[str, Json]


def optimization(config: ml_collections.ConfigDict) -> Optimization:
  """Returns learning rate, optimizer and averages of a config.

  Raises:
    UserError: a field of config.optim or config.ema has no valid value.
  """
  section, train = config.optim, config.train
  with config_errors("config.optim"):
    rate = optimizers.build_schedule(
      schedule=section.schedule,
      learning_rate=section.learning_rate,
      steps=train.steps,
      batch_size=train.batch_size,
      rampup_images=section.rampup_images,
      end_lr_fraction=section.end_lr_fraction,
      reference_steps=section.reference_steps,
    )
    names = ("name", "b1", "b2", "eps", "weight_decay", "clip")
    optimizer = optimizers.build(rate, **{k: section[k] for k in names})
  if config.lora.rank:
    optimizer = optax.masked(optimizer, lora.trainable)
  with config_errors("config.ema"):
    decays = ema.betas(config.ema.profiles, train.batch_size)
  return Optimization(rate, optimizer, decays)


def build_loss(
  config: ml_collections.ConfigDict, network: Network, teacher: Network | None
) -> LossFn:
  """Returns the loss of a config.

  Raises:
    UserError: a field of config.loss has no valid value.
  """
  return registry.build(
    "losses",
    config.loss.to_dict(),
    "config.loss",
    network=network,
    teacher=None if teacher is None else teacher.apply,
    sigma_d=config.sigma_d,
  )


def build_trainer(
  config: ml_collections.ConfigDict,
  network: Network,
  teacher: Network | None,
  mesh: jax.sharding.Mesh | None,
) -> Trainer:
  """Returns the trainer of a config.

  Args:
    config: sections loss, optim, ema and train are read.
    network: the network to train.
    teacher: the network that is distilled, None without one.
    mesh: the devices.

  Raises:
    UserError: a field has no valid value.
  """
  rate, optimizer, decays = optimization(config)
  train = config.train
  dtype = train.grad_dtype or ("float32" if train.grad_accum_steps > 1 else "")
  trained = replicas.network(network) if dtype else network
  return Trainer(
    build_loss(config, trained, teacher),
    network,
    optimizer,
    ema=decays,
    learning_rate=rate,
    mesh=mesh,
    loss_scale=train.loss_scale,
    grad_accum_steps=train.grad_accum_steps,
    grad_dtype=jnp.dtype(dtype) if dtype else None,
    init_extra_params=losses.facts(config.loss).init_extra_params,
    trainable=lora.trainable if config.lora.rank else lambda params: None,
  )


def batch_shapes(dataset: Dataset, batch_size: int) -> dict[str, Json]:
  """Returns shapes and types of a batch over all processes, without reading data."""
  return {
    "x0": jax.ShapeDtypeStruct((batch_size, *dataset.shape), jnp.float32),
    "cond": {name: spec.batch(batch_size) for name, spec in dataset.cond.items()},
  }


def training_data(config: ml_collections.ConfigDict, experiment: Experiment) -> Dataset:
  """Returns what batches are made of: the data, or stored trajectories of the teacher.

  Raises:
    UserError: the loss is not trained on trajectories, or they are those of other data,
      or of a solver with noise.
  """
  folder, facts = config.teacher.trajectories, losses.facts(config.loss)
  if not folder:
    return experiment.dataset
  if not facts.takes_trajectories:
    raise UserError(
      f"config.teacher.trajectories={folder}: config.loss.name={config.loss.name!r} is "
      "trained on data; leave it empty, or use the loss cmt"
    )
  about = teacher_trajectories.about(folder)
  data = file_io.as_json(config.data.to_dict())
  if about["data"] != data or about["sigma_d"] != config.sigma_d:
    raise UserError(f"config.teacher.trajectories={folder}: made from other data")
  if about["noise"]:
    raise UserError(
      f"config.teacher.trajectories={folder}: their solver adds noise, so their states "
      "do not determine their ends; make them with a solver such as dpmpp2m"
    )
  to_data = trigflow.END_TIME not in facts.cond
  return teacher_trajectories.read(folder, experiment.dataset.cond, to_data=to_data)


def trajectory_flops(config: ml_collections.ConfigDict) -> float:
  """Returns the floating-point operations by which stored trajectories were made."""
  folder = config.teacher.trajectories
  return teacher_trajectories.about(folder)["flops"] if folder else 0.0


def step_flops(
  config: ml_collections.ConfigDict,
  dataset: Dataset,
  teacher: Network | None,
  state: TrainState,
  key: PRNGKey,
  frozen: Params,
) -> float:
  """Returns the floating-point operations of one step, over all devices.

  They are counted in the lowered program, where the body of a loop counts once.
  Therefore the loop over the blocks of the network is unrolled, and attention is the
  plain one without a loop.

  Args:
    config: of the run.
    dataset: of the run.
    teacher: the network that is distilled, unrolled as well.
    state: state or its shapes.
    key: random key or its shape.
    frozen: parameters of the teacher or their shapes.
  """
  config = experiments.model_variant(config, "unrolled", "without_kernels")
  config.train.grad_accum_steps = 1
  network = experiments.network(config, dataset)
  trainer = build_trainer(config, network, teacher, mesh=None)
  source = dataset
  if config.teacher.trajectories:
    source = teacher_trajectories.metadata_only(
      config.teacher.trajectories, dataset.cond
    )
  batch = batch_shapes(source, config.train.batch_size)
  return flops.count_flops(trainer.update, state, batch, key, frozen)


def run_flops(config: ml_collections.ConfigDict, experiment: Experiment) -> float:
  """Returns the floating-point operations of one step of a run, over all devices.

  Only the shapes of the parameters are used, see `step_flops`.

  Args:
    config: of the run; the work directory of its teacher exists if its loss needs one.
    experiment: its pieces.
  """
  key = jax.eval_shape(lambda: jax.random.key(0))
  teacher = frozen = None
  if teachers.needs_teacher(config):
    section = config.teacher
    networks = [
      experiments.network(
        experiments.model_variant(workdir_lib.read(workdir), "unrolled"),
        experiment.dataset,
      )
      for workdir in (section.workdir, section.weak_workdir)
      if workdir
    ]
    if section.folder:
      unrolled = experiments.model_variant(config, "unrolled")
      networks.insert(0, teachers.published_teacher(unrolled, experiment.dataset))
    teacher, *weak = networks
    if weak:
      teacher = teachers.autoguided_teacher(teacher, *weak, section.autoguidance)
    frozen = jax.eval_shape(teacher.init, key)
  trainer = build_trainer(config, experiment.network, teacher, experiment.mesh)
  state = trainer.abstract_state()
  return step_flops(config, experiment.dataset, teacher, state, key, frozen)


def check_no_checkpoints(workdir: str) -> None:
  """Checks that a work directory has no checkpoints.

  Raises:
    UserError: it has some.
  """
  if checkpoints_lib.newest(workdir) is not None:
    raise UserError(f"{workdir}: has checkpoints already; choose another --workdir")


def save_initial(
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  workdir: str,
  params: Params,
) -> None:
  """Writes the work directory of a run that starts from given parameters.

  It holds the config and a checkpoint of step 0, so the other jobs accept it like the
  work directory of a trained run.

  Args:
    config: of the run.
    experiment: its pieces.
    workdir: the directory.
    params: parameters of the network.

  Raises:
    UserError: the directory holds another experiment, or the disk is full.
  """
  optimizer = optimization(config).optimizer
  workdir_lib.save_or_check_config(config, workdir, experiment.dataset)

  def create(params: Params) -> TrainState:
    return state.create(params, optimizer, tuple(config.ema.profiles))

  abstract = jax.eval_shape(create, params)
  placed = sharding.abstract_state(abstract, experiment.mesh)
  shardings = jax.tree.map(lambda x: x.sharding, placed)
  with Checkpoints(workdir) as checkpoints:
    checkpoints.check_disk(abstract, [0])
    checkpoints.save(0, jax.jit(create, out_shardings=shardings)(params))
