"""Job `convert`: makes a work directory of the weights in someone else's file."""

import inspect

import jax
import ml_collections
import numpy as np

from sdiff_jax import config as configs
from sdiff_jax import registry
from sdiff_jax.data import trajectories
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import objective
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.models import unet1d
from sdiff_jax.pretrained import policies, state_dict
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.training import state
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.types import Params, UserError


def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes config.json and a checkpoint of step 0, whose averages are the weights.

  Of a policy, its sizes and its normaliser as well, so it needs no data.

  Raises:
    UserError: the file does not fit the network, or the directory holds a run.
  """
  if not config.convert.file:
    raise UserError("config.convert.file is empty: name the file of the weights")
  check_empty(workdir)
  if config.data.name == "trajectories":
    config, experiment, params = _policy(config)
  else:
    experiment = experiments.build(config)
    like = jax.eval_shape(experiment.network.init, jax.random.key(0))
    params = _params(config, like)
  write(config, experiment, workdir, params)
  count = sum(x.size for x in jax.tree.leaves(params["net"]))
  return f"converted {count} parameters of {config.convert.file}: {workdir}"


def check_empty(workdir: str) -> None:
  """Raises a UserError if a work directory has checkpoints."""
  if checkpoints_lib.newest(workdir) is not None:
    raise UserError(f"{workdir} has checkpoints already; take another --workdir")


def write(
  config: ml_collections.ConfigDict,
  experiment: experiments.Experiment,
  workdir: str,
  params: Params,
) -> None:
  """Writes a work directory as a run of `experiment` that starts from `params`.

  What samples, measures, distils or goes on training takes it for a run's.
  """
  _, optimizer, _ = objective.optimisation(config)
  workdir_lib.save_or_check_config(config, workdir, experiment.dataset)

  def create(params: Params) -> state.TrainState:
    return state.create(params, optimizer, tuple(config.ema.profiles))

  abstract = jax.eval_shape(create, params)
  placed = workdir_lib.abstract_with_sharding(abstract, experiment.mesh)
  shardings = jax.tree.map(lambda x: x.sharding, placed)
  with Checkpoints(workdir) as checkpoints:
    checkpoints.check_disk(abstract, [0])
    checkpoints.save(0, jax.jit(create, out_shardings=shardings)(params))


def _params(config: ml_collections.ConfigDict, like: Params) -> Params:
  """Returns the parameters that the file holds for the network of a config."""
  chosen = config.model.to_dict()
  reader = getattr(
    inspect.getmodule(registry.lookup("models", chosen["name"]).build),
    "from_state_dict",
    None,
  )
  if reader is None:
    raise UserError(f"config.model.name={chosen['name']!r}: no file is known for it")
  wanted = inspect.signature(reader).parameters
  fields = {k: v for k, v in chosen.items() if k in wanted}
  return reader(state_dict.read(config.convert.file), like, **fields)


def _policy(
  config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, experiments.Experiment, Params]:
  """Returns config, experiment and parameters of a policy, with its own sizes.

  Raises:
    UserError: its process is not that of the U-Net's `ddpm`.
  """
  fields = {k: config.data[k] for k in ("horizon", "n_action_steps")}
  policy = policies.load(config.convert.file, **fields)
  abar, wanted = policy.schedule.abar, unet1d.noise()
  if policy.schedule.kind != "eps" or not np.array_equal(abar, wanted):
    raise UserError(
      f"{config.convert.file}: not of {len(wanted)} timesteps of the cosine schedule, "
      "or not of noise; only such policies can be converted"
    )
  config = config.copy_and_resolve_references()
  config.sigma_d = 1.0
  config.model = configs.component("models", "unet1d", process="ddpm", **policy.fields)
  config.data.update(
    horizon=policy.normaliser.shape[0],
    n_obs_steps=policy.normaliser.steps,
    n_action_steps=policy.executed,
    std=1.0,
  )
  source = trajectories.metadata_only(policy.normaliser)
  experiment = experiments.from_dataset(config, source)
  fresh = jax.jit(experiment.network.init)(jax.random.key(0))
  return config, experiment, {"net": policy.params, "logvar": fresh["logvar"]}
