"""What the jobs have in common: pieces of a config, work directories, samples."""

import importlib.util
import json
import os
import shlex
import sys
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from sdiff_jax import config as configs
from sdiff_jax import registry
from sdiff_jax.data import normalizer, pipeline, trajectories
from sdiff_jax.distributed import sharding
from sdiff_jax.io import file_io
from sdiff_jax.pretrained.diffusers import loading
from sdiff_jax.pretrained.diffusers.vae import Autoencoder
from sdiff_jax.training import ema, state
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.types import Network, Params, UserError

# Fields that may change between two runs in one work directory.
RUNTIME_FIELDS = ("train.log_every", "train.sample_every", "train.skip_nonfinite")
RUNTIME_FIELDS += (
  "checkpoint.",
  "mesh.",
  "sampler.",
  "sample.",
  "teacher.",
  "convert.",
)
RUNTIME_FIELDS += (
  "ema.posthoc_std",
  "encode.",
  "generate.",
  "study.",
  "job",
  "vae",
  "model.remat",
  "plugins",
)
RUNTIME_FIELDS += ("rehearse.", "demos.")
JOB_SECTIONS = ("evaluate", "reference", "rollout")  # sections of other jobs alone
RUNTIME_FIELDS += tuple(f"{section}." for section in JOB_SECTIONS)


NORMALISER = "normaliser.npz"


class Experiment(NamedTuple):
  """A config with its pieces built."""

  config: ml_collections.ConfigDict
  source: pipeline.Dataset
  network: Network
  mesh: Mesh
  vae: tuple[Autoencoder, Params] | None = None  # of a source of latents


def build(config: ml_collections.ConfigDict) -> Experiment:
  """Returns the pieces that a config names.

  Raises:
    UserError: a piece or the mesh refuses its fields.
  """
  return from_dataset(config, registry.build("data", config.data.to_dict()))


def from_dataset(
  config: ml_collections.ConfigDict, source: pipeline.Dataset
) -> Experiment:
  """Returns the pieces that a config names, with a source that is there already."""
  vae = _autoencoder(config.vae, source) if source.latent and config.vae else None
  return Experiment(config, source, network(config, source), mesh(config), vae)


def mesh(config: ml_collections.ConfigDict) -> Mesh:
  """Returns the mesh of a config.

  Raises:
    UserError: it does not make the devices that there are.
  """
  return sharding.make_mesh(**config.mesh)


def _autoencoder(folder: str, source: pipeline.Dataset) -> tuple[Autoencoder, Params]:
  """Returns the autoencoder of a source's latents, its weights on the host."""
  vae, params = loading.autoencoder(folder)
  if vae.channels != source.shape[-1]:
    raise UserError(
      f"config.vae={folder}: its latents have {vae.channels} channels, those of "
      f"config.data {source.shape[-1]}"
    )
  return vae, params


def network(config: ml_collections.ConfigDict, source: pipeline.Dataset) -> Network:
  """Returns the network of a config for the images, or actions, of a source.

  Raises:
    UserError: it refuses its fields, or takes no observations, and the source has some.
  """
  given = {
    "shape": source.shape,
    "classes": source.classes if config.class_conditional else 0,
    "sigma_d": config.sigma_d,
  }
  if source.observation:
    given["observation"] = source.observation
    if "observation" not in registry.required("models", config.model.name):
      raise UserError(
        f"config.model.name={config.model.name!r}: takes no observations, which "
        "config.data has; take unet1d or mlp"
      )
  return registry.build("models", config.model.to_dict(), **given)


def for_flop_count(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the config without a loop over blocks, whose operations count once."""
  config = config.copy_and_resolve_references()
  if "unroll" in config.model:
    config.model.unroll = config.model.depth
  return config


def init_extra_params(config: ml_collections.ConfigDict, params: Params) -> Params:
  """Returns a network's parameters with those that only the objective needs."""
  piece = registry.lookup("losses", config.loss.name)
  init_extra_params = piece.facts.get("init_extra_params", lambda params: params)
  return init_extra_params(params)


def save_or_check_config(
  config: ml_collections.ConfigDict, workdir: str, source: pipeline.Dataset
) -> None:
  """Writes config.json and command.txt, or checks that the config there is the same.

  And normaliser.npz, if the data have one: a policy is used without them.

  Raises:
    UserError: it is of another experiment; the message lists the fields that differ.
  """
  path = os.path.join(workdir, "config.json")
  if os.path.exists(path):
    mine, theirs = (configs.flat(c.to_dict()) for c in (config, read(workdir)))
    differ = [d for d in differences(theirs, mine) if not d.startswith(RUNTIME_FIELDS)]
    if differ:
      raise UserError(
        f"{workdir} holds another experiment: {', '.join(differ)}; take another "
        "--workdir, or the same values"
      )
  if jax.process_index() == 0:
    os.makedirs(workdir, exist_ok=True)
    resolved = _with_absolute_teacher(config.to_dict())
    file_io.write_text(path, json.dumps(resolved, indent=2))
    command = ["python", "-m", "sdiff_jax.main", *sys.argv[1:]]
    file_io.write_text(os.path.join(workdir, "command.txt"), shlex.join(command) + "\n")
    if source.normaliser:
      normalizer.save(os.path.join(workdir, NORMALISER), source.normaliser)


def differences(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
  """Returns "field (value there, value now)" for each field that differs."""
  return [
    f"{k} ({theirs.get(k)} there, {mine.get(k)} now)"
    for k in sorted(theirs.keys() | mine.keys())
    if theirs.get(k) != mine.get(k)
  ]


def _with_absolute_teacher(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the config with a teacher that is found from any directory."""
  teacher = config["teacher"]["workdir"]
  if teacher:
    config["teacher"]["workdir"] = os.path.abspath(teacher)
  return config


def load(file: str, missing: str) -> ml_collections.ConfigDict:
  """Returns the config of a file, "configs/X.py" or "configs/X.py:words".

  Raises:
    UserError: there is no such file; `missing` is the message.
  """
  path, _, given = file.partition(":")
  if not os.path.exists(path):
    raise UserError(missing)
  spec = importlib.util.spec_from_file_location("loaded_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(given) if given else module.get_config()


def takes_teacher(config: ml_collections.ConfigDict) -> bool:
  """Returns whether the objective starts from a trained run."""
  return "teacher" in registry.required("losses", config.loss.name)


def read(workdir: str) -> ml_collections.ConfigDict:
  """Returns the config that a work directory was trained with.

  Raises:
    UserError: there is none.
  """
  path = os.path.join(workdir, "config.json")
  try:
    with open(path, encoding="utf-8") as file:
      loaded = configs.with_new_names(_with_tuples(json.load(file)))
  except FileNotFoundError:
    raise UserError(
      f"{path} does not exist: train into {workdir} first (--job=train)"
    ) from None
  default = configs.base(tuple(loaded.get("plugins", ())))
  for section in configs.PIECES.keys() & loaded.keys():
    default[section] = ml_collections.ConfigDict(loaded[section])
  default.update(loaded)
  return default


def _with_tuples(value: Any) -> Any:
  """Returns what JSON held, with its lists as the tuples that they were."""
  if isinstance(value, dict):
    return {k: _with_tuples(v) for k, v in value.items()}
  return tuple(value) if isinstance(value, list) else value


def averages(
  experiment: Experiment, workdir: str, how_to_train: str, step: int = 0
) -> dict[str, Params]:
  """Returns profile -> averaged parameters of a checkpoint of a workdir.

  Args:
    experiment: gives the network, the profiles and the mesh.
    workdir: of the run.
    how_to_train: the end of the error's message.
    step: of the checkpoint; 0 for the newest.

  Raises:
    UserError: there is no such checkpoint.
  """
  profiles = experiment.config.ema.profiles
  params = jax.eval_shape(
    lambda key: init_extra_params(experiment.config, experiment.network.init(key)),
    jax.random.key(0),
  )
  abstract = abstract_with_sharding({p: params for p in profiles}, experiment.mesh)
  with Checkpoints(workdir) as checkpoints:
    found = checkpoints.restore_ema(abstract, step)
  if found is None and step:
    raise UserError(f"config.sample.checkpoint={step}: {workdir} has none of that step")
  if found is None:
    raise UserError(f"{workdir} has no checkpoint; train it: {how_to_train}")
  return found


def abstract_with_sharding(abstract: state.TrainState, mesh: Mesh) -> state.TrainState:
  """Returns abstract arrays that carry the sharding that they shall have."""

  def with_sharding(x: jax.ShapeDtypeStruct, s: jax.sharding.Sharding) -> object:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

  return jax.tree.map(with_sharding, abstract, sharding.state(abstract, mesh))


def stored_normaliser(workdir: str) -> normalizer.Normalizer | None:
  """Returns the normaliser of a policy's work directory, None of another's."""
  path = os.path.join(workdir, NORMALISER)
  return normalizer.load(path) if os.path.exists(path) else None


def trained(config: ml_collections.ConfigDict, workdir: str) -> tuple:
  """Returns the experiment of a trained work directory and its parameters.

  Data, model, loss and averages are those of the run; how to sample is `config`'s. Of
  trajectories the run's normaliser is enough.

  Raises:
    UserError: the work directory has no config or no checkpoint.
  """
  chosen = read(workdir)
  for section in ("sampler", "sample", "mesh", "teacher", "vae", *JOB_SECTIONS):
    chosen[section] = config[section]
  found = stored_normaliser(workdir)
  if found is None:
    experiment = build(chosen)
  else:
    experiment = from_dataset(chosen, trajectories.metadata_only(found))
  ema.betas(chosen.ema.profiles, 1)
  train = "the same command with --job=train"
  found = averages(experiment, workdir, train, config.sample.checkpoint)
  params = found[chosen.ema.profiles[0]]
  return experiment, params
