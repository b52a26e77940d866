"""Job `sample`: samples images from a trained work directory.

Every process writes its rows of a batch to WORKDIR/samples.parts as they are made. A
batch whose rows are all there is not made again. At the end process 0 makes samples.npz
of the parts; if that is too large for one host, it leaves them there, with an index.
"""

import itertools
import math
import os
import sys
import time
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from sdiff_jax import registry
from sdiff_jax.data import image_shards
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import pipelines, sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.experiment.pipelines import CompiledSampler, Pipeline
from sdiff_jax.io import bounded, file_io, image_io, resumable, storage
from sdiff_jax.io.progress import Progress
from sdiff_jax.samplers import SamplingStats
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.types import Params, UserError

PARTS = "*-p*.npz"  # of all processes
# Bytes of images above which several processes leave them in parts: 5,461 images of
# 256 x 256 pixels.
MAX_GATHERED = 2**30


@registry.register("jobs", "sample")
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes samples.npz (arr_0 uint8 NHWC, arr_1 labels) and samples.png.

  More than MAX_GATHERED bytes of images of several processes are never in one host:
  they stay in the folder samples.parts, which evaluate.images and data.path can name.

  Raises:
    UserError: a field does not fit, or the existing parts are of other images.
  """
  settings = _settings(config, workdir)
  experiment, params = workdir_lib.trained(config, workdir)
  num, size = config.sample.num, config.sample.batch_size
  with config_errors("config.sample"):
    sharding.check_batch(size, sharding.samples(experiment.mesh))
    all_bytes = num * math.prod(sampling.image_shape(experiment))
    in_parts = _stay_in_parts(all_bytes)
    if not in_parts:
      bounded.check_memory(all_bytes, f"num={num}: the array of all images")
  folder = os.path.join(workdir, "samples.parts")
  output = resumable.Output(folder, "samples", pattern=PARTS)
  sampler = sampling.build_sampler(config)
  pipeline = sampling.pipeline(config, experiment)
  if sampler.is_parallel and not sampler.window and output.parts():
    sampler = sampler.replace(window=(output.settings() or {}).get("window", 0))
  shape = (size, *pipeline.shape)
  sampler = pipelines.with_window(
    pipeline.mesh, sampler, pipeline.placeholder, params, shape
  )
  compiled = pipelines.batch_sampler(pipeline, sampler).compile(params, size)
  settings |= {"window": sampler.window if sampler.is_parallel else 0}
  output.claim(settings, write=jax.process_index() == 0)
  missing = _missing(output, num, size, pipeline)
  summary = _make_parts(output, pipeline, compiled, params, missing, num, size)
  path = folder if in_parts else os.path.join(workdir, "samples.npz")
  if jax.process_index() == 0:
    finish = _finish_in_parts if in_parts else _finish
    stats = finish(config, output, path, experiment)
    summary += pipelines.describe(sampler, stats)
  if config.sample.compare_sequential:
    indices = np.arange(size)
    pipelines.report_comparison(pipeline, sampler, compiled, params, indices)
  return f"made {num} images ({summary}): {path}"


def _stay_in_parts(size: int) -> bool:
  """Returns whether images of so many bytes are left where the processes wrote them."""
  return jax.process_count() > 1 and size > MAX_GATHERED


def _settings(config: ml_collections.ConfigDict, workdir: str) -> dict:
  """Returns what determines the images of a part: fields, and the newest checkpoint.

  It is called before that checkpoint is loaded: if a training run saves another one
  meanwhile, the parts are refused later rather than mixed.
  """
  sections = {name: config[name].to_dict() for name in ("sample", "sampler")}
  settings = resumable.flatten(sections) | {"vae": config.vae}
  settings["checkpoint"] = checkpoints_lib.newest(workdir)
  for name in ("sample.num", "sample.compare_sequential"):
    del settings[name]
  return settings


class PartsOnDisk(NamedTuple):
  """What the parts hold of images 0 to n.

  Attributes:
    stats: of the images, each [n].
    exist: which of them exist, bool [n].
    files: the parts.
    shard: number of the part of each image in `files`, int [n].
    row: row of each image in its part, int [n].
  """

  stats: SamplingStats
  exist: np.ndarray
  files: list[str]
  shard: np.ndarray
  row: np.ndarray


def _find(
  output: resumable.Output, num: int, images: np.ndarray | None = None
) -> PartsOnDisk:
  """Returns what the parts hold of images 0 to num.

  Args:
    output: the parts.
    num: number of images.
    images: array [num, H, W, C] to put the images into; None to put them nowhere.
  """
  shard, row = np.zeros(num, np.int32), np.zeros(num, np.int32)
  exist, files = np.zeros(num, bool), []
  stats = {name: np.zeros(num) for name in SamplingStats._fields}
  for path, part in output.read_parts(("indices", "images", *stats)):
    inside = part["indices"] < num
    indices = part["indices"][inside]
    exist[indices], shard[indices] = True, len(files)
    row[indices] = np.flatnonzero(inside)
    files.append(path)
    if images is not None:
      images[indices] = part["images"][inside]
    for name, values in stats.items():
      values[indices] = part[name][inside]
  return PartsOnDisk(SamplingStats(**stats), exist, files, shard, row)


def _missing(
  output: resumable.Output, num: int, size: int, pipeline: Pipeline
) -> list[int]:
  """Returns the first image of each batch to make, the same on every process."""
  firsts = range(0, num, size)
  complete = np.ones(len(firsts), bool)
  if jax.process_index() == 0:
    exist = _find(output, len(firsts) * size).exist
    complete = exist.reshape(-1, size).all(axis=1)
  complete = sharding.all_processes(complete, pipeline.mesh)
  return list(itertools.compress(firsts, ~complete))


def _make_parts(
  output: resumable.Output,
  pipeline: Pipeline,
  sampler: CompiledSampler,
  params: Params,
  missing: list[int],
  num: int,
  size: int,
) -> str:
  """Makes the missing batches, and waits for the other processes' parts.

  Returns:
    Their throughput, for the last line; "" if no batch was missing.
  """
  quiet = jax.process_index() > 0
  done = num - sum(min(size, num - first) for first in missing)
  if done and not quiet:
    print(f"resuming: {done} of {num} images exist", file=sys.stderr)
  started = (
    (
      first,
      *pipelines.start_batch(pipeline, sampler, params, np.arange(first, first + size)),
    )
    for first in missing
  )
  with Progress(
    num, label="sample", unit="image", initial=done, active=not quiet
  ) as progress:
    begin = time.perf_counter()
    # In pairs: the next batch is computed while this one is waited for and written.
    for batch, _ in itertools.pairwise(itertools.chain(started, [None])):
      _write_part(output, sampler, *batch)
      progress.add(min(size, num - batch[0]))
  sharding.all_processes(np.ones(1, bool), pipeline.mesh)
  seconds = time.perf_counter() - begin
  return f"{len(missing) * size / seconds:.4g} images/s, " if missing else ""


def _write_part(
  output: resumable.Output,
  sampler: CompiledSampler,
  first: int,
  images: jax.Array,
  stats: SamplingStats,
) -> None:
  """Writes the rows of a batch that this process holds, if it holds any.

  Raises:
    UserError: samples are not finite.
  """
  # Where several devices hold the same rows, one of them has replica 0.
  shards = [s for s in images.addressable_shards if s.replica_id == 0]
  if not shards:
    return
  indices, rows = np.arange(first, first + len(images)), [s.index[0] for s in shards]
  indices = np.concatenate([indices[r] for r in rows])
  values = {name: _rows(x, rows) for name, x in stats._asdict().items()}
  pipelines.check_finite(sampler, values["error"], indices)
  output.write_part(
    f"{first:08d}-p{jax.process_index()}.npz",
    indices=indices,
    images=np.concatenate([s.data for s in shards]),
    **values,
  )


def _rows(x: jax.Array, rows: list[slice]) -> np.ndarray:
  """Returns some rows of x [B] that this process holds."""
  by_start = {s.index[0].start or 0: s.data for s in x.addressable_shards}
  return np.concatenate([by_start[r.start or 0] for r in rows])


def _finish(
  config: ml_collections.ConfigDict,
  output: resumable.Output,
  path: str,
  experiment: Experiment,
) -> SamplingStats:
  """Writes samples.npz and samples.png from the parts, and removes these."""
  num = config.sample.num
  images = np.empty((num, *sampling.image_shape(experiment)), np.uint8)
  parts = _find(output, num, images)
  _check_all(parts, output)
  _, labels = sampling.seeds_and_labels(config, experiment, np.arange(num))
  file_io.write_npz(path, arr_0=images, arr_1=labels)
  _write_grid(path.replace(".npz", ".png"), experiment, images)
  for part in output.parts():  # before the settings, without which they mean nothing
    storage.remove(part)
  output.remove()
  return parts.stats


def _finish_in_parts(
  config: ml_collections.ConfigDict,
  output: resumable.Output,
  path: str,
  experiment: Experiment,
) -> SamplingStats:
  """Writes the index of the parts and samples.png."""
  num = config.sample.num
  parts = _find(output, num)
  _check_all(parts, output)
  _, labels = sampling.seeds_and_labels(config, experiment, np.arange(num))
  names = [os.path.basename(file) for file in parts.files]
  shape = sampling.image_shape(experiment)
  index = image_shards.Index(names, parts.shard, parts.row, labels, shape)
  image_shards.write(path, index)
  shown = np.arange(min(num, sampling.grid_size(experiment)[0]))
  images = image_shards.reader(path, index)(shown)
  grid = os.path.join(os.path.dirname(path), "samples.png")
  _write_grid(grid, experiment, images)
  return parts.stats


def _check_all(parts: PartsOnDisk, output: resumable.Output) -> None:
  """Raises a UserError if an image is in no part."""
  if not parts.exist.all():
    raise UserError(f"{output.folder} lost parts: the same command makes them again")


def _write_grid(path: str, experiment: Experiment, images: np.ndarray) -> None:
  """Writes a picture of the first of the images uint8 [n, H, W, C]."""
  count, columns = sampling.grid_size(experiment)
  image_io.save_png(path, image_io.grid(images[:count], columns))
