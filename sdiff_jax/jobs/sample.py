"""Job `sample`: makes images from a trained work directory, or goes on making them.

Every process writes its rows of a batch to WORKDIR/samples.parts as they are made; a
batch that is there whole is not made again.
"""

import glob
import itertools
import json
import os
import shutil
import sys
import zipfile
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm

from sdiff_jax import config as configs
from sdiff_jax import disk, sharding, writer
from sdiff_jax.interfaces import Params, UserError
from sdiff_jax.jobs import experiment as experiments


def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes samples.npz (arr_0 uint8 NHWC, arr_1 labels) and samples.png.

  Raises:
    UserError: a field does not fit, or the parts there are of other images.
  """
  settings = _settings(config, workdir)
  experiment, params = experiments.trained(config, workdir)
  solver = experiments.table(config)
  call = experiments.sampler(experiment, solver)
  sharding.check_batch(
    config.sample.batch_size, sharding.samples(experiment.mesh), "sample.batch_size"
  )
  folder = os.path.join(workdir, "samples.parts")
  _claim(folder, settings)
  _make_parts(folder, experiment, call, params)
  path = os.path.join(workdir, "samples.npz")
  if jax.process_index() == 0:
    _finish(folder, path, experiment)
  evaluations = f"{solver.evaluations} evaluations each"
  return f"made {config.sample.num} images ({evaluations}): {path}"


def _settings(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Returns what decides the images of a part: fields, and the newest checkpoint.

  To be asked before that is loaded: if a training run saves another one meanwhile,
  the parts are refused later rather than mixed.
  """
  sections = {name: config[name].to_dict() for name in ("sample", "sampler")}
  settings = configs.flat(sections) | {"checkpoint": disk.newest(workdir)}
  del settings["sample.num"]
  return json.loads(json.dumps(settings))  # tuples as they will be read


def _claim(folder: str, settings: dict[str, Any]) -> None:
  """Writes settings.json, or checks that the parts there were made with the same."""
  os.makedirs(folder, exist_ok=True)
  path = os.path.join(folder, "settings.json")
  if _parts(folder):
    with open(path, encoding="utf-8") as file:
      differ = experiments.differences(json.load(file), settings)
    if differ:
      raise UserError(
        f"{folder} holds parts of other samples: {', '.join(differ)}; remove it, or "
        "take the same values"
      )
  elif jax.process_index() == 0:
    writer.save_text(path, json.dumps(settings, indent=2))


def _parts(folder: str) -> list[str]:
  return sorted(glob.glob(os.path.join(glob.escape(folder), "*.npz")))


def _make_parts(
  folder: str, experiment: experiments.Experiment, call: Any, params: Params
) -> None:
  """Makes the batches that are missing, and waits for the other processes' parts."""
  num, size = experiment.config.sample.num, experiment.config.sample.batch_size
  missing, quiet = _missing(folder, experiment), jax.process_index() > 0
  done = num - sum(min(size, num - first) for first in missing)
  if done and not quiet:
    print(f"going on: {done} of {num} images are there", file=sys.stderr)
  batches = (
    (first, experiments.start_batch(experiment, call, params, first, size))
    for first in missing
  )
  with tqdm.tqdm(
    total=num, initial=done, unit="image", desc="sample", disable=quiet or None
  ) as bar:
    # In pairs: a batch is under way before the one before it is waited for.
    for (first, images), _ in itertools.pairwise(itertools.chain(batches, [None])):
      _write_part(folder, first, images)
      bar.update(min(size, num - first))
  sharding.agreed(np.ones(1, bool), experiment.mesh)


def _missing(folder: str, experiment: experiments.Experiment) -> list[int]:
  """Returns the first image of each batch to make, the same on every process."""
  num, size = experiment.config.sample.num, experiment.config.sample.batch_size
  firsts = range(0, num, size)
  there = np.ones(len(firsts), bool)
  if jax.process_index() == 0:
    _, images_there = _collect(folder, len(firsts) * size, experiment.source.shape)
    there = images_there.reshape(-1, size).all(axis=1)
  there = sharding.agreed(there, experiment.mesh)
  return list(itertools.compress(firsts, ~there))


def _write_part(folder: str, first: int, images: jax.Array) -> None:
  """Writes the rows of a batch that this process holds, if it holds any."""
  # Where several devices hold the same rows, one of them has replica 0.
  shards = [s for s in images.addressable_shards if s.replica_id == 0]
  if not shards:
    return
  indices = np.arange(first, first + len(images))
  _save(
    os.path.join(folder, f"{first:08d}-p{jax.process_index()}.npz"),
    indices=np.concatenate([indices[s.index[0]] for s in shards]),
    images=np.concatenate([s.data for s in shards]),
  )


def _save(path: str, **arrays: np.ndarray) -> None:
  """Writes an .npz whole or not at all."""
  temporary = path + ".tmp"
  with open(temporary, "wb") as file:
    np.savez(file, **arrays)
  os.replace(temporary, path)


def _collect(
  folder: str, num: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns images 0 to num of the parts, and which of them are there, [num].

  A part that cannot be read is named on stderr and removed, to be made again.
  """
  images, there = np.empty((num, *shape), np.uint8), np.zeros(num, bool)
  for path in _parts(folder):
    try:
      with np.load(path) as part:
        indices, rows = part["indices"], part["images"]
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
      print(f"{path} is damaged, making it again: {error}", file=sys.stderr)
      os.remove(path)
      continue
    wanted = indices < num
    images[indices[wanted]] = rows[wanted]
    there[indices[wanted]] = True
  return images, there


def _finish(folder: str, path: str, experiment: experiments.Experiment) -> None:
  """Writes samples.npz and samples.png from the parts, and removes them."""
  sample, source = experiment.config.sample, experiment.source
  images, there = _collect(folder, sample.num, source.shape)
  if not there.all():
    raise UserError(f"{folder} has lost parts: the same command makes them again")
  _, labels = experiments.seeds_and_labels(experiment, 0, sample.num)
  _save(path, arr_0=images, arr_1=labels)
  count, columns = experiments.grid_size(experiment)
  writer.save_png(path.replace(".npz", ".png"), writer.grid(images[:count], columns))
  for part in _parts(folder):  # before settings.json, without which they mean nothing
    os.remove(part)
  shutil.rmtree(folder)
