"""Job `sample`: makes images from a trained work directory, or goes on making them.

Every process writes its rows of a batch to WORKDIR/samples.parts as they are made; a
batch that is there whole is not made again.
"""

import functools
import glob
import itertools
import json
import os
import shutil
import sys
import time
import zipfile
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import tqdm

from sdiff_jax import registry
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.io import file_io, image_io, resumable
from sdiff_jax.samplers import autotune
from sdiff_jax.samplers._sliding_window import Samples
from sdiff_jax.samplers.sampler import Sampler
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.types import Params, UserError

STATS = ("passes", "evaluations", "error", "variation")  # of a Result, one an image


@registry.register("jobs", "sample")
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes samples.npz (arr_0 uint8 NHWC, arr_1 labels) and samples.png.

  Raises:
    UserError: a field does not fit, or the parts there are of other images.
  """
  settings = _settings(config, workdir)
  experiment, params = workdir_lib.trained(config, workdir)
  size = config.sample.batch_size
  over_samples = sharding.samples(experiment.mesh)
  with config_errors("config.sample"):
    sharding.check_batch(size, over_samples)
  folder = os.path.join(workdir, "samples.parts")
  chosen = sampling.plan(config)
  if chosen.loop and not chosen.window and _parts(folder):
    chosen = chosen._replace(window=_read(folder).get("window", 0))  # go on with that
  chosen = sampling.with_window(config, experiment, chosen, params, size)
  call = sampling.sampler(config, experiment, chosen)
  call = sampling.compiled(config, experiment, call, params, size)
  _claim(folder, settings | {"window": chosen.window})
  took = _make_parts(config, folder, experiment, call, params)
  path = os.path.join(workdir, "samples.npz")
  if jax.process_index() == 0:
    took += _finish(config, folder, path, experiment, chosen)
  if config.sample.compare_sequential:
    _compare(config, experiment, chosen, call, params)
  return f"made {config.sample.num} images ({took}): {path}"


def _settings(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Returns what decides the images of a part: fields, and the newest checkpoint.

  To be asked before that is loaded: if a training run saves another one meanwhile,
  the parts are refused later rather than mixed.
  """
  sections = {name: config[name].to_dict() for name in ("sample", "sampler")}
  settings = resumable.flatten(sections) | {"vae": config.vae}
  settings["checkpoint"] = checkpoints_lib.newest(workdir)
  for name in ("sample.num", "sample.compare_sequential"):
    del settings[name]
  return json.loads(json.dumps(settings))  # tuples as they will be read


def _claim(folder: str, settings: dict[str, Any]) -> None:
  """Writes settings.json, or checks that the parts there were made with the same."""
  os.makedirs(folder, exist_ok=True)
  if _parts(folder):
    differ = resumable.differences(_read(folder), settings)
    if differ:
      raise UserError(
        f"{folder} holds parts of other samples: {', '.join(differ)}; remove it, or "
        "take the same values"
      )
  elif jax.process_index() == 0:
    path = os.path.join(folder, "settings.json")
    file_io.write_text(path, json.dumps(settings, indent=2))


def _read(folder: str) -> dict[str, Any]:
  with open(os.path.join(folder, "settings.json"), encoding="utf-8") as file:
    return json.load(file)


def _parts(folder: str) -> list[str]:
  return sorted(glob.glob(os.path.join(glob.escape(folder), "*.npz")))


def _make_parts(
  config: ml_collections.ConfigDict,
  folder: str,
  experiment: experiments.Experiment,
  call: sampling.Call,
  params: Params,
) -> str:
  """Makes the batches that are missing, and waits for the other processes' parts.

  Returns:
    Their rate, for the last line; "" if none was missing.
  """
  num, size = config.sample.num, config.sample.batch_size
  missing, quiet = _missing(config, folder, experiment), jax.process_index() > 0
  done = num - sum(min(size, num - first) for first in missing)
  if done and not quiet:
    print(f"going on: {done} of {num} images are there", file=sys.stderr)
  batches = (
    (first, *sampling.start_batch(config, experiment, call, params, first, size))
    for first in missing
  )
  with tqdm.tqdm(
    total=num, initial=done, unit="image", desc="sample", disable=quiet or None
  ) as bar:
    begin = time.perf_counter()
    # In pairs: a batch is under way before the one before it is waited for.
    for made, _ in itertools.pairwise(itertools.chain(batches, [None])):
      _write_part(folder, *made)
      bar.update(min(size, num - made[0]))
  sharding.all_processes(np.ones(1, bool), experiment.mesh)
  seconds = time.perf_counter() - begin
  return f"{len(missing) * size / seconds:.4g} images/s, " if missing else ""


def _missing(
  config: ml_collections.ConfigDict, folder: str, experiment: experiments.Experiment
) -> list[int]:
  """Returns the first image of each batch to make, the same on every process."""
  num, size = config.sample.num, config.sample.batch_size
  firsts = range(0, num, size)
  there = np.ones(len(firsts), bool)
  if jax.process_index() == 0:
    found = _collect(folder, len(firsts) * size, sampling.image_shape(experiment))
    there = found.there.reshape(-1, size).all(axis=1)
  there = sharding.all_processes(there, experiment.mesh)
  return list(itertools.compress(firsts, ~there))


def _write_part(folder: str, first: int, images: jax.Array, result: Samples) -> None:
  """Writes the rows of a batch that this process holds, if it holds any."""
  indices = np.arange(first, first + len(images))
  # Where several devices hold the same rows, one of them has replica 0.
  shards = [s for s in images.addressable_shards if s.replica_id == 0]
  if not shards:
    return
  held = [s.index[0] for s in shards]
  _save(
    os.path.join(folder, f"{first:08d}-p{jax.process_index()}.npz"),
    indices=np.concatenate([indices[rows] for rows in held]),
    images=np.concatenate([s.data for s in shards]),
    **{name: _rows(getattr(result, name), held) for name in STATS},
  )


def _rows(x: jax.Array, held: list[slice]) -> np.ndarray:
  """Returns rows of x [B] that this process holds."""
  by_start = {s.index[0].start or 0: s.data for s in x.addressable_shards}
  return np.concatenate([by_start[rows.start or 0] for rows in held])


def _save(path: str, **arrays: np.ndarray) -> None:
  """Writes an .npz whole or not at all."""
  temporary = path + ".tmp"
  with open(temporary, "wb") as file:
    np.savez(file, **arrays)
  os.replace(temporary, path)


class PartsOnDisk(NamedTuple):
  """What the parts hold of images 0 to n, what each took, and which are there."""

  images: np.ndarray
  took: dict[str, np.ndarray]
  there: np.ndarray


def _collect(folder: str, num: int, shape: tuple[int, ...]) -> PartsOnDisk:
  """Returns images 0 to num of the parts.

  A part that cannot be read is named on stderr and removed, to be made again.
  """
  images, there = np.empty((num, *shape), np.uint8), np.zeros(num, bool)
  took = {name: np.zeros(num) for name in STATS}
  for path in _parts(folder):
    try:
      with np.load(path) as part:
        part = {name: part[name] for name in ("indices", "images", *STATS)}
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
      print(f"{path} is damaged, making it again: {error}", file=sys.stderr)
      os.remove(path)
      continue
    wanted = part["indices"] < num
    indices = part["indices"][wanted]
    images[indices] = part["images"][wanted]
    for name, values in took.items():
      values[indices] = part[name][wanted]
    there[indices] = True
  return PartsOnDisk(images, took, there)


def _finish(
  config: ml_collections.ConfigDict,
  folder: str,
  path: str,
  experiment: experiments.Experiment,
  chosen: Sampler,
) -> str:
  """Writes samples.npz and samples.png from the parts, and removes them.

  Returns:
    What the images took, for the last line.
  """
  sample = config.sample
  found = _collect(folder, sample.num, sampling.image_shape(experiment))
  if not found.there.all():
    raise UserError(f"{folder} has lost parts: the same command makes them again")
  _, labels = sampling.seeds_and_labels(config, experiment, 0, sample.num)
  _save(path, arr_0=found.images, arr_1=labels)
  count, columns = sampling.grid_size(experiment)
  picture = image_io.grid(found.images[:count], columns)
  image_io.save_png(path.replace(".npz", ".png"), picture)
  for part in _parts(folder):  # before settings.json, without which they mean nothing
    os.remove(part)
  shutil.rmtree(folder)
  return _took(found.took, chosen)


def _took(took: dict[str, np.ndarray], chosen: Sampler) -> str:
  """Returns passes and evaluations of an image, and what is known of its error."""
  mean = {name: values.mean() for name, values in took.items()}
  line = f"{mean['evaluations']:.4g} evaluations each"
  if not chosen.loop:
    return line
  line += f" in {mean['passes']:.4g} passes, {chosen.table.evaluations} one by one"
  if chosen.loop == "spec":
    return line + ", the same law"
  line += f"; largest accepted change {took['error'].max():.2g}"
  if chosen.loop == "para" and chosen.table.uses("s"):
    variation = mean["variation"]
    known = "says nothing" if variation >= 1 else f"at most {variation:.2g}"
    line += f", total variation {known}"
  return line


def _compare(
  config: ml_collections.ConfigDict,
  experiment: experiments.Experiment,
  chosen: Sampler,
  call: sampling.Call,
  params: Params,
) -> None:
  """Prints the time of a batch beside the sequential sampler's, and the difference."""
  size = config.sample.batch_size
  alone = sampling.sampler(config, experiment, chosen._replace(loop=""))
  alone = sampling.compiled(config, experiment, alone, params, size)

  def start(each: sampling.Call) -> jax.Array:
    return sampling.start_batch(config, experiment, each, params, 0, size)[0]

  thunks = (functools.partial(start, each) for each in (call, alone))
  line = autotune.compare_with_sequential(experiment.mesh, size, *thunks)
  if jax.process_index() == 0:
    print(line, file=sys.stderr)
