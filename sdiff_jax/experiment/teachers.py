"""The networks that a run is distilled from or starts from: runs, and published models."""

import functools
import os

import jax
import jax.numpy as jnp
import ml_collections

from sdiff_jax import losses
from sdiff_jax.data import Dataset
from sdiff_jax.data.episodes import normalizer
from sdiff_jax.diffusion import guidance
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.io import storage
from sdiff_jax.pretrained.diffusers import saving, trigflow_network
from sdiff_jax.training.trainer import Trainer
from sdiff_jax.types import Array, Cond, Network, Params, PRNGKey, UserError

# Parameters of an autoguided teacher: those of its two networks.
TEACHER, WEAK = "teacher", "weak"


def needs_teacher(config: ml_collections.ConfigDict) -> bool:
  """Returns whether the loss of a config distills a teacher."""
  return losses.facts(config.loss).needs_teacher


def load_teacher(
  config: ml_collections.ConfigDict, experiment: Experiment
) -> tuple[Network | None, Params]:
  """Returns the network and the parameters of config.teacher.workdir or teacher.folder.

  Those of a work directory are averages.

  Returns:
    (None, None) for a loss without a teacher. With teacher.weak_workdir those of
    `autoguided_teacher`.

  Raises:
    UserError: the loss needs a teacher and there is none, it needs none and there is
      one, there are two, or the teacher was trained on other data.
  """
  workdir, file = config.teacher.workdir, config.teacher.config
  section = config.teacher
  if workdir and section.folder:
    raise UserError(
      f"config.teacher.folder={section.folder}: leave config.teacher.workdir empty, which "
      "names another teacher"
    )
  if section.autoguidance != 1 and not section.weak_workdir:
    raise UserError(
      f"config.teacher.autoguidance={section.autoguidance}: needs the worse network of "
      "config.teacher.weak_workdir"
    )
  if not needs_teacher(config):
    for field in ("workdir", "folder"):
      if section[field]:
        raise UserError(
          f"config.teacher.{field}={section[field]}: config.loss distills no teacher; to "
          "start from its weights, use config.init_from instead"
        )
    return None, None
  if section.folder:
    teacher = published_teacher(config, experiment.dataset)
    params = _published_params("teacher.folder", section.folder, experiment)
    key = jax.eval_shape(lambda: jax.random.key(0))
    logvar = jax.eval_shape(teacher.init, key)["logvar"]
    params["logvar"] = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), logvar)
  elif workdir:
    teacher, params = _load("teacher.workdir", workdir, file, config, experiment)
  else:
    command = _command(file or "configs/..._diffusion.py", "DIR")
    raise UserError(
      "config.teacher.workdir is empty: name the run to distill, trained by: "
      f"{command}; or name a published model, config.teacher.folder"
    )
  if not section.weak_workdir:
    return teacher, params
  weak, weak_params = _load(
    "teacher.weak_workdir",
    section.weak_workdir,
    "",
    config,
    experiment,
    section.weak_checkpoint,
  )
  params = {TEACHER: params, WEAK: weak_params}
  return autoguided_teacher(teacher, weak, section.autoguidance), params


def published_teacher(config: ml_collections.ConfigDict, dataset: Dataset) -> Network:
  """Returns the network of config.teacher.folder for the data of a run.

  Its hidden layers have the dtype of the student's, and its blocks run as the student's.

  Raises:
    UserError: it is for other data.
  """
  folder = config.teacher.folder
  if not experiments.is_folder(folder):
    raise UserError(
      f"config.teacher.folder={folder}: has no {saving.INDEX}; name a folder in the "
      "diffusers format, or hf://ORG/NAME"
    )
  same = {k: config.model[k] for k in ("dtype", "scan_blocks") if k in config.model}
  return experiments.published(folder, dataset, label="config.teacher", **same)


def _published_params(
  field: str, folder: str, experiment: Experiment, guided: bool = False
) -> Params:
  """Returns the weights of the network of a folder, on the mesh."""
  place = functools.partial(sharding.state, mesh=experiment.mesh)
  try:
    return trigflow_network.parameters(folder, guidance=guided, place=place)
  except UserError as error:
    raise UserError(f"config.{field}: {error}") from error


def autoguided_teacher(teacher: Network, weak: Network, scale: float) -> Network:
  """Returns the network F_weak + scale (F - F_weak), see `guidance.autoguided`.

  Its parameters are {TEACHER: ..., WEAK: ...}, those of both networks.
  """

  def init(key: PRNGKey) -> Params:
    return {TEACHER: teacher.init(key), WEAK: weak.init(key)}

  def apply(
    params: Params, x: Array, t: Array, cond: Cond, *, key: PRNGKey | None = None
  ) -> Array:
    net = functools.partial(teacher.apply, params[TEACHER], key=key)
    other = functools.partial(weak.apply, params[WEAK], key=key)
    return guidance.autoguided(net, other, scale)(x, t, cond)

  return teacher._replace(init=init, apply=apply)


def load_init(
  config: ml_collections.ConfigDict, experiment: Experiment
) -> Params | None:
  """Returns the parameters of config.init_from, None if it is empty.

  They are the averages of a run, or the weights of a published network.

  Raises:
    UserError: there is no such run, or it was trained on other data.
  """
  if not config.init_from:
    return None
  if experiments.is_folder(config.init_from):
    guided = bool(config.model.get("guidance", False))
    return _published_params("init_from", config.init_from, experiment, guided)
  params = _load(
    "init_from", config.init_from, config.teacher.config, config, experiment
  )[1]
  return experiments.merged(workdir_lib.read(config.init_from), params)


def initial_params(
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  trainer: Trainer,
  frozen: Params,
) -> Params | None:
  """Returns the parameters that a network starts from, None for random ones.

  Args:
    config: of the run.
    experiment: its pieces.
    trainer: of the network.
    frozen: parameters of the teacher, which may be the same and then are not read again.

  Raises:
    UserError: there are no such parameters, or they are those of another network.
  """
  paths = config.init_from, config.teacher.workdir or config.teacher.folder
  if config.init_from and len({storage.absolute(p) for p in paths}) == 1:
    # The teacher, which is already in memory.
    init_from = frozen[TEACHER] if config.teacher.weak_workdir else frozen
  else:
    init_from = load_init(config, experiment)
  if init_from is None:
    return None
  try:
    jax.eval_shape(trainer.create_state, jax.random.key(0), init_from)
  except ValueError as error:
    raise UserError(f"config.{error}; use the same config.model") from error
  return init_from


def _load(
  field: str,
  workdir: str,
  file: str,
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  step: int = 0,
) -> tuple[Network, Params]:
  """Returns the network and the averaged parameters of another run on the same data."""
  command = _command(file or "configs/..._diffusion.py", workdir)
  if not storage.exists(os.path.join(workdir, "config.json")):
    raise UserError(
      f"config.{field}={workdir}: no run there; train it first: {command}"
    )
  stored = workdir_lib.read(workdir)
  same_data = stored.data.to_dict() == config.data.to_dict()
  if not same_data or stored.sigma_d != config.sigma_d:
    raise UserError(f"config.{field}={workdir}: trained on other data")
  scales = workdir_lib.stored_normalizer(workdir), experiment.dataset.normalizer
  if scales[0] and not normalizer.allclose(*scales):
    raise UserError(
      f"config.{field}={workdir}: its {workdir_lib.NORMALIZER} is not that of the "
      f"episodes in {config.data.path}"
    )
  network = experiments.network(stored, experiment.dataset)
  profile = stored.ema.profiles[0]
  averages = workdir_lib.restore_ema(
    stored, network, experiment.mesh, workdir, command, step, profiles=(profile,)
  )
  return network, averages[profile]


def _command(file: str, workdir: str) -> str:
  return f"python -m sdiff_jax.main --config={file} --workdir={workdir}"
