"""What the jobs have in common: pieces of a config, work directories, samples."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from sdiff_jax import config as configs
from sdiff_jax import ema, guidance, lookup, sharding, state, trigflow, writer
from sdiff_jax.checkpoint import Checkpoints
from sdiff_jax.data import pipeline
from sdiff_jax.interfaces import Array, Network, Params, UserError
from sdiff_jax.samplers import sequential, tables

ROWS = 10  # of a grid of samples; its columns are the classes
# Fields that may change between two runs in one work directory.
FREE = ("train.log_every", "train.sample_every", "train.skip_nonfinite")
FREE += ("checkpoint.", "mesh.", "sampler.", "sample.", "teacher.")
FREE += ("evaluate.", "reference.")


class Experiment(NamedTuple):
  """A config with its pieces built."""

  config: ml_collections.ConfigDict
  source: pipeline.Source
  network: Network
  mesh: Mesh


def build(config: ml_collections.ConfigDict) -> Experiment:
  """Returns the pieces that a config names.

  Raises:
    UserError: a piece or the mesh refuses its fields.
  """
  source = lookup.build("data", config.data.to_dict())
  return Experiment(
    config, source, network(config, source), sharding.make_mesh(**config.mesh)
  )


def network(config: ml_collections.ConfigDict, source: pipeline.Source) -> Network:
  """Returns the network of a config for the images of a source."""
  return lookup.build(
    "models", config.model.to_dict(), shape=source.shape, classes=source.classes
  )


def title(config: ml_collections.ConfigDict) -> str:
  """Returns "teacher", "sCD" or "sCT"."""
  if config.loss.name == "diffusion":
    return "teacher"
  return {"teacher": "sCD", "data": "sCT"}[config.loss.velocity]


def claim(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Writes config.json and command.txt, or checks that the config there is the same.

  Raises:
    UserError: it is of another experiment; the message lists the fields that differ.
  """
  path = os.path.join(workdir, "config.json")
  if os.path.exists(path):
    mine, theirs = (configs.flat(c.to_dict()) for c in (config, read(workdir)))
    differ = [d for d in differences(theirs, mine) if not d.startswith(FREE)]
    if differ:
      raise UserError(
        f"{workdir} holds another experiment: {', '.join(differ)}; take another "
        "--workdir, or the same values"
      )
  if jax.process_index() == 0:
    os.makedirs(workdir, exist_ok=True)
    resolved = _with_absolute_teacher(config.to_dict())
    writer.save_text(path, json.dumps(resolved, indent=2))
    command = ["python", "-m", "sdiff_jax.main", *sys.argv[1:]]
    writer.save_text(os.path.join(workdir, "command.txt"), shlex.join(command) + "\n")


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


def read(workdir: str) -> ml_collections.ConfigDict:
  """Returns the config that a work directory was trained with.

  Raises:
    UserError: there is none.
  """
  path = os.path.join(workdir, "config.json")
  try:
    with open(path, encoding="utf-8") as file:
      loaded = _with_tuples(json.load(file))
  except FileNotFoundError:
    raise UserError(
      f"{path} does not exist: train into {workdir} first (--job=train)"
    ) from None
  default = configs.base()
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
  params = jax.eval_shape(experiment.network.init, jax.random.key(0))
  abstract = place({p: params for p in profiles}, experiment.mesh)
  with Checkpoints(workdir) as checkpoints:
    found = checkpoints.restore_ema(abstract, step)
  if found is None and step:
    raise UserError(f"config.sample.checkpoint={step}: {workdir} has none of that step")
  if found is None:
    raise UserError(f"{workdir} has no checkpoint; train it: {how_to_train}")
  return found


def place(abstract: state.TrainState, mesh: Mesh) -> state.TrainState:
  """Returns abstract arrays that carry the sharding that they shall have."""

  def with_sharding(x: jax.ShapeDtypeStruct, s: jax.sharding.Sharding) -> object:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

  return jax.tree.map(with_sharding, abstract, sharding.state(abstract, mesh))


def trained(config: ml_collections.ConfigDict, workdir: str) -> tuple:
  """Returns the experiment of a trained work directory and its parameters.

  Data, model, loss and averages are those of the run; how to sample is `config`'s.

  Raises:
    UserError: the work directory has no config or no checkpoint.
  """
  chosen = read(workdir)
  for section in ("sampler", "sample", "evaluate", "reference", "mesh", "teacher"):
    chosen[section] = config[section]
  experiment = build(chosen)
  ema.betas(chosen.ema.profiles, 1)
  train = "the same command with --job=train"
  found = averages(experiment, workdir, train, config.sample.checkpoint)
  params = found[chosen.ema.profiles[0]]
  return experiment, params


def table(
  config: ml_collections.ConfigDict, sampler: str | None = None
) -> tables.Table:
  """Returns the solver of config.sampler, or of a word such as "heun/16".

  Raises:
    UserError: an unknown solver or bad angles.
  """
  name, steps, angles = config.sampler.name, config.sampler.steps, config.sampler.angles
  if sampler is not None:
    name, steps = configs.name_and_number(sampler, "evaluate.samplers")
    angles = ()
  try:
    return tables.build(
      sigma_d=config.sigma_d, name=name, steps=int(steps), angles=tuple(angles)
    )
  except ValueError as error:
    raise UserError(f"config.{error}") from error


def sampler(
  experiment: Experiment, solver: tables.Table
) -> Callable[[Params, Array, Array], Array]:
  """Returns (params, seeds [B], labels [B]) -> images uint8 [B, H, W, C], jitted.

  Image k depends on seeds[k] and labels[k] alone, so neither the batch size nor the
  mesh changes it beyond rounding.
  """
  config, source = experiment.config, experiment.source
  scale = config.sample.guidance
  takes_scale = config.model.get("guidance", False)

  def generate(params: Params, seeds: Array, labels: Array) -> Array:
    cond = {"label": labels}

    def net(x: Array, t: Array, cond: dict) -> Array:
      return experiment.network.apply(params, x, t, cond)

    if takes_scale:
      cond["guidance"] = jnp.full(labels.shape, scale, jnp.float32)
    elif scale != 1:
      net = guidance.classifier_free(net, scale)
    keys = sequential.keys_of(seeds)
    x = sequential.initial(solver, keys, source.shape)
    denoiser = trigflow.denoiser(net, config.sigma_d)
    x0 = sequential.sample(denoiser, solver, x, keys, cond)
    return pipeline.decode(source, x0, config.sigma_d)

  over_samples = sharding.samples(experiment.mesh)
  return jax.jit(
    generate,
    in_shardings=(None, over_samples, over_samples),
    out_shardings=over_samples,
  )


def seeds_and_labels(
  experiment: Experiment, first: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns seeds and labels of images first, first + 1, ..., int32 [count] each."""
  sample, classes = experiment.config.sample, experiment.source.classes
  seeds = np.arange(first, first + count, dtype=np.int32) + sample.seed
  if sample.label < 0:
    return seeds, seeds % max(classes, 1)
  return seeds, np.full_like(seeds, sample.label)


def start_batch(
  experiment: Experiment,
  call: Callable[[Params, Array, Array], Array],
  params: Params,
  first: int,
  batch_size: int,
) -> jax.Array:
  """Returns images first, first + 1, ...: uint8 [batch_size, H, W, C], over `samples`.

  They are being computed still: only who reads them waits for the devices.

  Args:
    experiment: gives the mesh, the first seed and the classes.
    call: `sampler(...)`, or its compiled form for this batch size.
    params: parameters to sample from.
    first: image k is made from seed + k.
    batch_size: images to make.
  """
  over_samples = sharding.samples(experiment.mesh)
  # Not device_put, which compares the processes' values and so waits for the devices.
  seeds, labels = (
    jax.make_array_from_callback(x.shape, over_samples, x.__getitem__)
    for x in seeds_and_labels(experiment, first, batch_size)
  )
  return call(params, seeds, labels)


def generate(
  experiment: Experiment,
  call: Callable[[Params, Array, Array], Array],
  params: Params,
  *,
  num: int,
  batch_size: int,
  field: str = "sample.batch_size",
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields batches of images uint8 [n, H, W, C] and labels [n], `num` in all.

  Args:
    experiment: gives the mesh, the first seed and the classes.
    call: `sampler(...)`, or its compiled form for this batch size.
    params: parameters to sample from.
    num: images in all.
    batch_size: images a call; the last batch is filled up, then cut.
    field: of the config that gave the batch size, for the error.

  Raises:
    UserError: the batch size does not divide over the mesh.
  """
  mesh = experiment.mesh
  sharding.check_batch(batch_size, sharding.samples(mesh), field)
  for first in range(0, num, batch_size):
    images = start_batch(experiment, call, params, first, batch_size)
    images = np.asarray(jax.device_put(images, sharding.replicated(mesh)))
    count = min(batch_size, num - first)
    yield images[:count], seeds_and_labels(experiment, first, count)[1]


def grid_size(experiment: Experiment) -> tuple[int, int]:
  """Returns the number of images and of columns of a grid of samples."""
  columns = experiment.source.classes or ROWS
  columns = columns if columns <= 10 else ROWS
  return ROWS * columns, columns
