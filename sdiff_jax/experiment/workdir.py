"""Work directories: the config they hold, their checkpoints, and failed writes."""

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Iterator, Sequence

import jax
import ml_collections
from jax.sharding import Mesh

from sdiff_jax import config as configs
from sdiff_jax import losses
from sdiff_jax.data import Dataset, trajectories
from sdiff_jax.data.episodes import normalizer
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import provenance, stored_config
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.io import file_io, resumable, storage
from sdiff_jax.pretrained.diffusers import hub, loading, trigflow_network
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.training import finite
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.types import Json, Network, Params, UserError

NORMALIZER = "normalizer.npz"
OLD_NORMALIZER = "normaliser.npz"  # its name in work directories of earlier versions
# What helps against errors of the system, by their numbers.
REMEDIES = {
  "free space": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
  "change the permissions": (errno.EACCES, errno.EPERM, errno.EROFS),
  "move it out of the way": (errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
  "allow more open files (ulimit -n)": (errno.EMFILE, errno.ENFILE),
  "use a shorter name": (errno.ENAMETOOLONG,),
  "remove the symbolic link": (errno.ELOOP,),
  "free memory": (errno.ENOMEM,),
  "check the disk": (errno.EIO, errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT),
}
NETWORK = "network"  # folder of the config files of a published network
OUTPUT_FOLDERS = (checkpoints_lib.FOLDER, NETWORK, "images", "samples", "samples.parts")
OUTPUT_FOLDERS += ("profile", "tensorboard")
OUTPUT_FILES = (stored_config.CONFIG, "command.txt", "images.json", "images.png")
OUTPUT_FILES += ("metrics.jsonl", "parameters.txt", "samples.npz", "samples.png")
OUTPUT_FILES += ("data.json", "goodput.json", "training.json", "versions.json")


def save_or_check_config(
  config: ml_collections.ConfigDict, workdir: str, dataset: Dataset
) -> None:
  """Writes config.json and command.txt, or checks that the stored config is the same.

  The normalizer of a data set of trajectories is stored as well, so that a policy can
  be used without its data, and so are the config files of a published network.

  Raises:
    UserError: the directory holds another experiment; the message lists the fields
      that differ.
  """
  path = os.path.join(workdir, stored_config.CONFIG)
  if storage.lexists(path):
    stored, current = (_identity(c.to_dict()) for c in (read(workdir), config))
    if different := provenance.changes(stored, current, workdir, dataset):
      raise UserError(
        f"{workdir} holds another experiment: {', '.join(different)}; use another "
        "--workdir, or the same values"
      )
  _store_network(config, workdir)
  if jax.process_index() == 0:
    storage.makedirs(workdir)
    file_io.write_json(path, _with_absolute_paths(config.to_dict()))
    command = shlex.join(["python", "-m", "sdiff_jax.main", *sys.argv[1:]]) + "\n"
    text = command.encode("utf-8", "backslashreplace")  # arguments need not be UTF-8
    file_io.write_bytes(os.path.join(workdir, "command.txt"), text)
    provenance.note_data(config.to_dict(), workdir, dataset)
    if dataset.normalizer:
      normalizer.save(os.path.join(workdir, NORMALIZER), dataset.normalizer)


def _identity(config: dict[str, Json]) -> dict[str, Json]:
  """Returns the fields that identify an experiment, flat: all but runtime fields."""
  runtime = configs.runtime_fields()
  return {
    name: value
    for name, value in resumable.flatten(config).items()
    if not {name, name.partition(".")[0]} & runtime
  }


def _with_absolute_paths(config: dict[str, Json]) -> dict[str, Json]:
  """Returns the config with absolute paths of the work directories of other runs."""
  sections = (config["teacher"], "workdir"), (config["teacher"], "folder")
  for section, name in (*sections, (config["model"], "folder"), (config, "init_from")):
    path = section.get(name)
    if path and not path.startswith(hub.HUB):
      section[name] = storage.absolute(path)
  return config


def _store_network(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Copies the config files of a published network into a work directory.

  Raises:
    UserError: the directory has those of another network.
  """
  folder = config.model.get("folder")
  target = os.path.join(workdir, NETWORK)
  if not folder or storage.absolute(folder) == storage.absolute(target):
    return
  if not experiments.is_folder(target):
    if jax.process_index() == 0:
      trigflow_network.copy_configs(folder, target)
  elif loading.configs(folder) != loading.configs(target):
    raise UserError(
      f"{workdir} holds another experiment: config.model.folder={folder} has other "
      "networks; use another --workdir, or the same folder"
    )


def read(workdir: str) -> ml_collections.ConfigDict:
  """Returns the config that a work directory was trained with.

  A published network is that whose config files are stored in the directory.

  Args:
    workdir: of the run.

  Raises:
    UserError: there is no config, or it is damaged.
  """
  config = stored_config.read(workdir)
  network = os.path.join(workdir, NETWORK)
  if config.model.get("folder") and experiments.is_folder(network):
    config.model.folder = network
  return config


def parent(config: ml_collections.ConfigDict) -> str:
  """Returns the work directory that a run was distilled or started from, or "".

  Of a run that started from a published model it is "".
  """
  path = config.teacher.workdir or config.init_from
  return "" if experiments.is_folder(path) else path


def restore_ema(
  config: ml_collections.ConfigDict,
  network: Network,
  mesh: Mesh,
  workdir: str,
  how_to_train: str,
  step: int = 0,
  profiles: Sequence[str] = (),
) -> dict[str, Params]:
  """Returns the averaged parameters of a checkpoint, by EMA profile.

  Args:
    config: of the run.
    network: of the run.
    mesh: of the devices that get the parameters.
    workdir: of the run.
    how_to_train: end of the error message.
    step: of the checkpoint; 0 for the newest.
    profiles: the averages to read; () for all.

  Raises:
    UserError: there is no such checkpoint.
  """
  init_extra_params = losses.facts(config.loss).init_extra_params
  params = jax.eval_shape(
    lambda key: init_extra_params(network.init(key)), jax.random.key(0)
  )
  abstract = {profile: params for profile in profiles or config.ema.profiles}
  averages = None
  if checkpoints_lib.steps(workdir):  # otherwise the folder would be created
    placed = sharding.abstract_state(abstract, mesh)
    with Checkpoints(workdir) as checkpoints:
      averages = checkpoints.restore_ema(placed, step)
  if averages is None and step:
    raise UserError(f"config.sample.checkpoint={step}: {workdir} has none of that step")
  if averages is None:
    raise UserError(f"{workdir} has no checkpoint; train it: {how_to_train}")
  found = step or checkpoints_lib.newest(workdir)
  finite.check(averages, f"{workdir}, checkpoint {found}", "use another checkpoint")
  return averages


def stored_normalizer(workdir: str) -> normalizer.Normalizer | None:
  """Returns the normalizer of a policy's work directory, None of any other."""
  for name in (NORMALIZER, OLD_NORMALIZER):
    path = os.path.join(workdir, name)
    if storage.exists(path):
      return normalizer.load(path)
  return None


def stored_experiment(
  stored: ml_collections.ConfigDict, config: ml_collections.ConfigDict, workdir: str
) -> Experiment:
  """Returns the experiment of a work directory, on the devices of `config`.

  Of trajectories the stored normalizer suffices; the data are not read.

  Args:
    stored: the config in the work directory (`read`).
    config: gives the mesh and the autoencoder.
    workdir: the work directory.

  Raises:
    UserError: a piece refuses its fields.
  """
  stored = stored.copy_and_resolve_references()
  stored.mesh, stored.vae = config.mesh, config.vae
  statistics = stored_normalizer(workdir)
  if statistics is None:
    return experiments.build(stored)
  return experiments.from_dataset(stored, trajectories.metadata_only(statistics))


def trained(
  config: ml_collections.ConfigDict, workdir: str
) -> tuple[Experiment, Params]:
  """Returns the experiment of a trained work directory and its averaged parameters.

  Data, model and loss are those of the stored config; `config` gives the mesh, the
  autoencoder and the step of the checkpoint (sample.checkpoint).

  Raises:
    UserError: the work directory has no config or no checkpoint.
  """
  stored = read(workdir)
  experiment = stored_experiment(stored, config, workdir)
  averages = restore_ema(
    stored,
    experiment.network,
    experiment.mesh,
    workdir,
    "the same command with --job=train",
    config.sample.checkpoint,
    stored.ema.profiles[:1],
  )
  return experiment, averages[stored.ema.profiles[0]]


def check_writable(workdir: str) -> None:
  """Checks that a work directory can be created and written; creates nothing.

  Raises:
    UserError: the message names the directory that is in the way.
  """
  if storage.remote(workdir):
    storage.check_access(workdir)
    return
  folder = workdir
  while not os.path.lexists(folder):
    folder = os.path.dirname(folder)
  if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(
      f"--workdir={workdir}: {folder} is not a directory that this user may write; "
      "use another --workdir, or change its permissions"
    )


def check_outputs(workdir: str) -> None:
  """Checks that nothing stands where a job will write a file or a folder.

  Raises:
    UserError: the message names what is in the way.
  """
  if storage.remote(workdir):  # where nothing is in the way of anything
    return
  for name in OUTPUT_FOLDERS:
    path = os.path.join(workdir, name)
    if os.path.lexists(path) and not os.path.isdir(path):
      raise UserError(f"{path} is not a directory; move it out of the way")
  for name in OUTPUT_FILES:
    path = os.path.join(workdir, name)
    if os.path.isdir(path):
      raise UserError(f"{path} is a directory; move it out of the way")


@contextlib.contextmanager
def errors(workdir: str) -> Iterator[None]:
  """Turns the errors of the system, such as a full disk, into a UserError.

  Raises:
    UserError: the message names the file and the last good checkpoint.
  """
  try:
    yield
  except OSError as error:
    remedies = [text for text, codes in REMEDIES.items() if error.errno in codes]
    if not remedies:  # a fault of this program
      raise
    step = checkpoints_lib.newest(workdir)
    safe = "" if step is None else f"; the last good checkpoint is that of step {step}"
    raise UserError(
      f"{error.filename or workdir}: {error.strerror}{safe}; {remedies[0]}, then repeat the "
      "command to resume"
    ) from error
