"""Job `trajectories`: stores trajectories of a trained network, from noise to a sample.

Every process writes the trajectories of its devices to WORKDIR/trajectories, a file for
each batch. A batch whose trajectories are all there is not made again. A student with the
loss `cmt` is trained on them (config.teacher.trajectories).
"""

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sdiff_jax import registry, samplers
from sdiff_jax.data import teacher_trajectories
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import pipelines, sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.experiment.pipelines import CompiledSampler
from sdiff_jax.fields import Count
from sdiff_jax.io import bounded, file_io, resumable
from sdiff_jax.io.progress import Progress
from sdiff_jax.samplers import Sampler
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.training import flops
from sdiff_jax.types import Json, Params, UserError

# Arrays of a part that are not conditions; what a job that resumes reads of it.
COST = ("indices", "num_evaluations", "num_iterations")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectories:
  """The trajectories that are stored; sampler and sample say how they are made.

  Attributes:
    num: number of trajectories.
    batch_size: trajectories of a batch, over all devices.
    folder: of the files, in the work directory.
  """

  num: Count = 4096
  batch_size: Count = 64
  folder: str = "trajectories"


@registry.register(
  "jobs",
  "trajectories",
  sections={"trajectories": Trajectories},
  runtime=("trajectories",),
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes trajectories.json and files of states (see `data.teacher_trajectories`).

  Raises:
    UserError: a field does not fit, the sampler has no states to store, they are not
      finite, or the folder holds other trajectories.
  """
  section = config.trajectories
  num, size = section.num, section.batch_size
  settings = _settings(config, workdir)
  experiment, params = workdir_lib.trained(config, workdir)
  mesh = experiment.mesh
  sampling.check_request(config, experiment, num)
  with config_errors("config.trajectories"):
    sharding.check_batch(size, sharding.samples(mesh))
  sampler = sampling.build_sampler(config)
  if not sampler.takes("record"):
    raise UserError(
      f"config.sampler.name={sampler.name!r}: keeps no states of a trajectory; use a "
      "solver alone, or behind para or spec"
    )
  folder = os.path.join(workdir, section.folder)
  output = resumable.Output(
    folder, "trajectories", pattern=teacher_trajectories.PATTERN
  )
  if sampler.is_parallel and not sampler.window and output.parts():
    sampler = sampler.replace(window=(output.settings() or {}).get("window", 0))
  placeholder = sampling.placeholder(experiment, config.sample.guidance)
  shape = (size, *experiment.dataset.shape)
  sampler = pipelines.with_window(mesh, sampler, placeholder, params, shape)
  bounded.check_memory(
    math.prod(shape) * 4 * (sampler.num_steps + 1), f"batch_size={size}: its states"
  )
  settings |= {"window": sampler.window if sampler.is_parallel else 0}
  output.claim(settings, write=jax.process_index() == 0)
  missing = _missing(output, num, size, mesh)
  start = time.perf_counter()
  if missing:
    compiled = _recorder(config, experiment, sampler).compile(params, size)
    _make_parts(config, experiment, output, compiled, params, missing)
  seconds = time.perf_counter() - start
  sharding.all_processes(np.ones(1, bool), mesh)
  evaluations, iterations = _cost(output, num)
  if jax.process_index() == 0:
    found: teacher_trajectories.About = {
      "size": num,
      "grid": sampler.tableau.grid.tolist(),
      "shape": [*experiment.dataset.shape],
      "sigma_d": experiment.sigma_d,
      "noise": sampler.tableau.uses_noise or sampler.tableau.uses_noise_before,
      "evaluations": int(evaluations.sum()),
      "flops": evaluations.sum() * _evaluation_flops(config, workdir, experiment),
      "data": workdir_lib.read(workdir).data.to_dict(),
      "settings": settings,
    }
    path = os.path.join(folder, teacher_trajectories.ABOUT)
    file_io.write_json(path, file_io.as_json(found))
  rate = f"{len(missing) * size / seconds:.4g} trajectories/s, " if missing else ""
  return (
    f"made {num} trajectories of {len(sampler.tableau.grid)} states ({rate}"
    f"{evaluations.mean():.4g} evaluations each in {iterations.mean():.4g} iterations): "
    f"{folder}"
  )


def _settings(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Json]:
  """Returns what determines the states of a part: fields, and the newest checkpoint."""
  settings = resumable.flatten({"sampler": config.sampler.to_dict()})
  names = ("seed", "guidance", "label")
  settings |= {f"sample.{name}": config.sample[name] for name in names}
  step = config.sample.checkpoint or checkpoints_lib.newest(workdir)
  batch_size = config.trajectories.batch_size
  return settings | {"checkpoint": step, "trajectories.batch_size": batch_size}


def _recorder(
  config: ml_collections.ConfigDict, experiment: Experiment, sampler: Sampler
) -> CompiledSampler:
  """Returns (params, seeds, conditions) -> states [B, N + 1, ...] of the grid, jitted."""
  specs = experiment.dataset.cond

  def decode(constants: Params, params: Params, states: jax.Array) -> tuple:
    del constants, params
    return states, pipelines.finite_samples(states)

  where = sharding.samples(experiment.mesh)
  pipeline = pipelines.Pipeline(
    mesh=experiment.mesh,
    shape=experiment.dataset.shape,
    denoiser=lambda params, cond: (
      sampling.denoiser(experiment, params, config.sample.guidance),
      cond,
    ),
    placeholder=sampling.placeholder(experiment, config.sample.guidance),
    decode_checked=decode,
    inputs=lambda count: {name: spec.batch(count) for name, spec in specs.items()},
    input_shardings=dict.fromkeys(specs, where),
    requests=_requests(config, experiment),
    dtype=experiment.dtype,
  )
  return pipelines.batch_sampler(pipeline, sampler, record=True)


def _requests(
  config: ml_collections.ConfigDict, experiment: Experiment
) -> Callable[[np.ndarray], tuple[np.ndarray, dict[str, np.ndarray]]]:
  return lambda indices: sampling.seeds_and_conditions(config, experiment, indices)


def _missing(
  output: resumable.Output, num: int, size: int, mesh: jax.sharding.Mesh
) -> list[int]:
  """Returns the first trajectory of each batch to make, the same on every process."""
  firsts = range(0, num, size)
  complete = np.ones(len(firsts), bool)
  if jax.process_index() == 0:
    exist = np.zeros(len(firsts) * size, bool)
    for _, part in output.read_parts(COST):
      exist[part["indices"][part["indices"] < len(exist)]] = True
    wanted = np.arange(len(exist)) < num
    complete = (exist | ~wanted).reshape(-1, size).all(axis=1)
  complete = sharding.all_processes(complete, mesh)
  return list(itertools.compress(firsts, ~complete))


def _make_parts(
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  output: resumable.Output,
  sampler: CompiledSampler,
  params: Params,
  missing: list[int],
) -> None:
  """Makes the missing batches, and writes the rows of each that this process holds."""
  num, size = config.trajectories.num, config.trajectories.batch_size
  where = sharding.samples(experiment.mesh)
  done = num - sum(min(size, num - first) for first in missing)
  with Progress(
    num,
    label="trajectories",
    unit="sample",
    initial=done,
    active=jax.process_index() == 0,
  ) as progress:
    for first in missing:
      indices = np.arange(first, first + size)
      seeds, cond = _requests(config, experiment)(indices)
      rows = sharding.rows(where, size)
      rows = rows[indices[rows] < num]
      placed = sharding.device_put_global(
        (seeds, cond), (where, dict.fromkeys(cond, where))
      )
      states, stats = sampler(params, *placed)
      states, *stats = (_held(x, rows) for x in (states, *stats))
      stats = dict(zip(samplers.SamplingStats._fields, stats, strict=True))
      pipelines.check_finite(sampler, stats["error"], indices[rows])
      output.write_part(
        f"states-{first:08d}-p{jax.process_index()}.npz",
        indices=indices[rows],
        seeds=seeds[rows],
        states=states,
        **stats,
        **{f"cond_{name}": value[rows] for name, value in cond.items()},
      )
      progress.add(min(size, num - first))


def _held(x: jax.Array, rows: np.ndarray) -> np.ndarray:
  """Returns some rows of x [B, ...], all of which this process holds."""
  shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
  held = np.concatenate([np.arange(k, k + len(v)) for k, v in sorted(shards.items())])
  values = np.concatenate([np.asarray(v) for _, v in sorted(shards.items())])
  return values[np.searchsorted(held, rows)]


def _cost(output: resumable.Output, num: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns evaluations and iterations of the trajectories, int [num] each."""
  evaluations, iterations = np.zeros((2, num), np.int64)
  for _, part in output.read_parts(COST):
    inside = part["indices"] < num
    at = part["indices"][inside]
    evaluations[at] = part["num_evaluations"][inside]
    iterations[at] = part["num_iterations"][inside]
  return evaluations, iterations


def _evaluation_flops(
  config: ml_collections.ConfigDict, workdir: str, experiment: Experiment
) -> float:
  """Returns the floating-point operations of an evaluation of the denoiser."""
  stored = experiments.model_variant(
    workdir_lib.read(workdir), "unrolled", "without_kernels"
  )
  network = experiments.network(stored, experiment.dataset)
  unrolled = dataclasses.replace(experiment, network=network)
  call = sampling.placeholder(unrolled, config.sample.guidance)
  params = jax.eval_shape(network.init, jax.random.key(0))
  size = config.trajectories.batch_size
  x = jax.ShapeDtypeStruct((size, *experiment.dataset.shape), jnp.float32)
  return flops.count_flops(call, params, x) / size
