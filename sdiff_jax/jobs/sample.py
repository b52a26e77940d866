"""Job `sample`: samples images from a trained work directory.

Every process writes its rows of a batch to WORKDIR/samples.parts as they are made. A
batch whose rows are all there is not made again.
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
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import pipelines, sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.experiment.pipelines import CompiledSampler, Pipeline
from sdiff_jax.io import bounded, file_io, image_io, resumable
from sdiff_jax.io.progress import Progress
from sdiff_jax.samplers import SamplingStats
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.types import Params, UserError


@registry.register("jobs", "sample")
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes samples.npz (arr_0 uint8 NHWC, arr_1 labels) and samples.png.

  Raises:
    UserError: a field does not fit, or the existing parts are of other images.
  """
  settings = _settings(config, workdir)
  experiment, params = workdir_lib.trained(config, workdir)
  num, size = config.sample.num, config.sample.batch_size
  with config_errors("config.sample"):
    sharding.check_batch(size, sharding.samples(experiment.mesh))
    image_bytes = math.prod(sampling.image_shape(experiment))
    bounded.check_memory(num * image_bytes, f"num={num}: the array of all images")
  output = resumable.Output(os.path.join(workdir, "samples.parts"), "samples")
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
  image_shape = sampling.image_shape(experiment)
  missing = _missing(output, num, size, image_shape, pipeline)
  summary = _make_parts(output, pipeline, compiled, params, missing, num, size)
  path = os.path.join(workdir, "samples.npz")
  if jax.process_index() == 0:
    stats = _finish(config, output, path, experiment)
    summary += pipelines.describe(sampler, stats)
  if config.sample.compare_sequential:
    indices = np.arange(size)
    pipelines.report_comparison(pipeline, sampler, compiled, params, indices)
  return f"made {num} images ({summary}): {path}"


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
  """Images 0 to n of the parts, their stats, and which of them exist."""

  images: np.ndarray
  stats: SamplingStats
  exist: np.ndarray


def _collect(output: resumable.Output, num: int, shape: tuple[int, ...]) -> PartsOnDisk:
  """Returns images 0 to num of the parts."""
  images, exist = np.empty((num, *shape), np.uint8), np.zeros(num, bool)
  stats = {name: np.zeros(num) for name in SamplingStats._fields}
  for part in output.read_parts(("indices", "images", *stats)):
    inside = part["indices"] < num
    indices = part["indices"][inside]
    images[indices], exist[indices] = part["images"][inside], True
    for name, values in stats.items():
      values[indices] = part[name][inside]
  return PartsOnDisk(images, SamplingStats(**stats), exist)


def _missing(
  output: resumable.Output,
  num: int,
  size: int,
  image_shape: tuple[int, ...],
  pipeline: Pipeline,
) -> list[int]:
  """Returns the first image of each batch to make, the same on every process."""
  firsts = range(0, num, size)
  complete = np.ones(len(firsts), bool)
  if jax.process_index() == 0:
    parts = _collect(output, len(firsts) * size, image_shape)
    complete = parts.exist.reshape(-1, size).all(axis=1)
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
  images, stats, exist = _collect(output, num, sampling.image_shape(experiment))
  if not exist.all():
    raise UserError(f"{output.folder} lost parts: the same command makes them again")
  _, labels = sampling.seeds_and_labels(config, experiment, np.arange(num))
  file_io.write_npz(path, arr_0=images, arr_1=labels)
  count, columns = sampling.grid_size(experiment)
  picture = image_io.grid(images[:count], columns)
  image_io.save_png(path.replace(".npz", ".png"), picture)
  for part in output.parts():  # before the settings, without which they mean nothing
    os.remove(part)
  output.remove()
  return stats
