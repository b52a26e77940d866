"""Job `convert`: imports pretrained weights into a work directory."""

import dataclasses
import os
import sys

import jax
import ml_collections
import numpy as np

from sdiff_jax import config as config_lib
from sdiff_jax import registry
from sdiff_jax.data import trajectories
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import training
from sdiff_jax.fields import Path
from sdiff_jax.io import downloads
from sdiff_jax.models import unet1d
from sdiff_jax.pretrained import diffusion_policy, lerobot
from sdiff_jax.pretrained.files import state_dict, to_tensors
from sdiff_jax.types import Json, Params, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
  """Pretrained weights.

  Attributes:
    file: weights: .pt, .safetensors, .npz, or a .pkl of EDM or EDM2. The images of EDM
      are data with mean 0 and std 0.5.
  """

  file: Path = ""


@registry.register(
  "jobs",
  "convert",
  sections={"convert": Convert},
  runtime=("convert",),
  creates_workdir=True,
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes config.json and a checkpoint of step 0; its EMA weights are the weights.

  For a policy, the sizes and the normalizer are written, too, so no data are needed.

  Raises:
    UserError: the file does not fit the network, or the directory holds a run.
  """
  if not config.convert.file:
    raise UserError(
      "config.convert.file is empty: set it to the path of the pretrained weights"
    )
  training.check_no_checkpoints(workdir)
  if config.data.name == "trajectories":
    config, experiment, params = _policy(config)
  else:
    config, experiment, params = _network(config)
  training.save_initial(config, experiment, workdir, params)
  count = sum(x.size for x in jax.tree.leaves(params["net"]))
  return f"converted {count} parameters of {config.convert.file}: {workdir}"


def _network(
  config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, experiments.Experiment, Params]:
  """Returns config, experiment and parameters of a pretrained network.

  Fields of the network that only the file tells are those of the file; those that it does
  not tell are the config's, and are printed.

  Raises:
    UserError: no reader is registered for the network, or the file does not fit it.
  """
  section, file = config.model.to_dict(), config.convert.file
  tensors, settings = state_dict.read_with_settings(file)
  state_dict.check_finite(tensors, file)
  if all(to_tensors.SEPARATOR in name for name in tensors):
    return _exported(config, tensors)
  readers = registry.names("pretrained")
  if section["name"] not in readers:
    raise UserError(
      f"config.model.name={section['name']!r}: pretrained weights can be read for "
      f"{', '.join(readers)}"
    )
  config = _with_settings(config, settings)
  section = config.model.to_dict()
  experiment = experiments.build(config)
  like = jax.eval_shape(experiment.network.init, jax.random.key(0))
  fields = registry.fields("pretrained", section["name"])
  section = {k: v for k, v in section.items() if k == "name" or k in fields}
  try:
    params = registry.build(
      "pretrained", section, label="config.model", tensors=tensors, like=like
    )
  except UserError as error:
    raise UserError(f"{file}: {error}") from error
  return config, experiment, params


def _exported(
  config: ml_collections.ConfigDict, tensors: dict[str, np.ndarray]
) -> tuple[ml_collections.ConfigDict, experiments.Experiment, Params]:
  """Returns config, experiment and parameters of a file of `--job=export`.

  Raises:
    UserError: the file does not fit the network of the config.
  """
  experiment = experiments.build(config)
  like = jax.eval_shape(experiment.network.init, jax.random.key(0))
  shapes = {name: x.shape for name, x in to_tensors.flat(like).items()}
  found = {name: x.shape for name, x in tensors.items()}
  if different := sorted(dict(shapes.items() ^ found.items())):
    raise UserError(
      f"{config.convert.file}: the tensors do not fit config.model: {len(different)} are "
      f"missing, left over or of another shape, such as {different[0]}"
    )
  return config, experiment, to_tensors.unflat(tensors, like)


def _with_settings(
  config: ml_collections.ConfigDict, settings: dict[str, Json]
) -> ml_collections.ConfigDict:
  """Returns the config with the settings that a file tells of its network.

  Args:
    config: of the run.
    settings: numbers by their names in the file, such as "unet.label_balance".

  Raises:
    UserError: the config sets a field to another value than the file's.
  """
  config = config.copy_and_resolve_references()
  name, file = config.model.name, config.convert.file
  defaults, assumed = registry.fields("models", name), []
  if (sigma_data := settings.get("sigma_data", config.sigma_d)) != config.sigma_d:
    raise UserError(
      f"config.sigma_d={config.sigma_d}: must be sigma_data={sigma_data} of {file}"
    )
  for field, find in registry.lookup("pretrained", name).facts["untold"].items():
    told = find(settings)
    if told is None:
      assumed.append(f"{field}={config.model[field]}")
    elif config.model[field] in (told, defaults[field]):
      config.model[field] = told
    else:
      raise UserError(
        f"config.model.{field}={config.model[field]}: must be {told}, which {file} tells"
      )
  if assumed and jax.process_index() == 0:
    print(
      f"{file}: assumed {', '.join(assumed)}, which the file does not tell; set "
      "config.model to change them",
      file=sys.stderr,
    )
  return config


def _policy(
  config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, experiments.Experiment, Params]:
  """Returns config, experiment and parameters of a pretrained policy.

  The sizes of the network and the normalizer are those of the policy.

  Raises:
    UserError: its diffusion process is not that of the U-Net's process="ddpm".
  """
  path = downloads.local(config.convert.file)
  if os.path.isdir(path):
    policy = lerobot.load(path)
  else:
    policy = diffusion_policy.load(
      path,
      horizon=config.data.horizon,
      n_action_steps=config.data.n_action_steps,
      groups=config.model.get("groups", unet1d.GROUPS),
    )
  abar = unet1d.noise()
  if policy.schedule.kind != "eps" or not np.array_equal(policy.schedule.abar, abar):
    raise UserError(
      f"{path}: the policy must predict the noise at {len(abar)} timesteps of the "
      "cosine schedule; no other policy can be converted"
    )
  config = config.copy_and_resolve_references()
  config.sigma_d = 1.0
  config.model = config_lib.component(
    "models", "unet1d", process="ddpm", **policy.fields
  )
  config.data.update(
    horizon=policy.normalizer.shape[0],
    n_obs_steps=policy.normalizer.steps,
    n_action_steps=policy.n_action_steps,
    std=1.0,
  )
  source = trajectories.metadata_only(policy.normalizer)
  experiment = experiments.from_dataset(config, source)
  fresh = jax.jit(experiment.network.init)(jax.random.key(0))
  return config, experiment, {"net": policy.params, "logvar": fresh["logvar"]}
