"""Job `train`: trains a network from a config, or resumes an interrupted run."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import jax
import ml_collections

from sdiff_jax import registry
from sdiff_jax.data import Dataset, batches
from sdiff_jax.distributed import executables, processes, sharding, signals
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import checks, previews, provenance, teachers, training
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.fields import Count, Index, Length, Positive, Range
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.training import finite, goodput, loop, metric_writer, summary
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.training.goodput import Goodput
from sdiff_jax.training.profiling import Profiler
from sdiff_jax.training.state import TrainState
from sdiff_jax.types import Array, Batch, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
  """How long a network is trained, and on which batches.

  Attributes:
    steps: number of training steps.
    batch_size: samples of a batch, over all devices.
    grad_accum_steps: parts of a batch that the network processes sequentially; more
      parts need less memory.
    grad_dtype: type in which devices add the gradients of a step that each of them has
      summed over its samples; "" for float32 with grad_accum_steps, and for the type
      of the network without.
    loss_scale: factor of the loss, by which the gradients are divided again: the mean
      over a batch and all pixels is too small for float16.
    flip: whether images are mirrored horizontally with probability 1/2.
    shuffle_buffer: samples that are shuffled at a time, while the files of the data are
      read one after the other, which buckets need; 0 shuffles all.
    loader_threads: threads of each process that read and decode; 0 for one a core, 2 to
      16.
    log_every: steps between lines of the log.
    sample_every: steps between grids of samples; 0 for none.
    evaluate_every: steps between metrics of samples, those of the section `evaluate`, by
      the sampler of the config; 0 for none.
    skip_nonfinite: whether steps with a NaN or an infinity are skipped; otherwise they
      stop the run.
    executable: file of the compiled step that --config.rehearse.save made, which is then
      not compiled; "" compiles it. It may run code: use your own files alone.
    profile: (first step, number of steps) that are traced into WORKDIR/profile; () for
      none.
    profiler_port: at which process 0 answers profilers, such as xprof; 0 for none.
  """

  steps: Index = 1000
  batch_size: Count = 128
  grad_accum_steps: Count = 1
  grad_dtype: Literal["", "float32", "bfloat16"] = ""
  loss_scale: Positive = 1.0
  flip: bool = False
  shuffle_buffer: Index = 0
  loader_threads: Annotated[int, Range(0, 256)] = 0
  log_every: Count = 50
  sample_every: Index = 0
  evaluate_every: Index = 0
  skip_nonfinite: bool = False
  executable: str = ""
  profile: Annotated[tuple[Count, ...], Length(0, 2)] = ()
  profiler_port: Annotated[int, Range(0, 65_535)] = 0

  def __post_init__(self) -> None:
    if len(self.profile) == 1:
      raise ValueError(
        f"profile={self.profile}: must be (first step, number of steps), or () for none"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriterFields:
  """Where metrics go besides metrics.jsonl and TensorBoard's files.

  Attributes:
    wandb: project on Weights & Biases (pip install wandb); "" for none. Its environment
      variables choose the rest: WANDB_MODE=offline, WANDB_ENTITY=...
  """

  wandb: str = ""


@registry.register(
  "jobs",
  "train",
  sections={"train": Train, "writer": WriterFields},
  runtime=(
    *("train.log_every", "train.sample_every", "train.evaluate_every"),
    *("train.skip_nonfinite", "train.loader_threads", "train.executable"),
    *("train.profile", "train.profiler_port", "writer"),
  ),
  creates_workdir=True,
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Trains into `workdir`, and returns a line with the result.

  Raises:
    UserError: a field, the teacher or the work directory is not valid, or the loss is
      not finite.
    Stopped: a signal stopped the run; its state is saved.
  """
  spent = Goodput(goodput.read(workdir))
  begin = time.perf_counter()
  experiment = experiments.build(config)
  mesh, dataset = experiment.mesh, experiment.dataset
  size, parts = config.train.batch_size, config.train.grad_accum_steps
  with config_errors("config.train"):
    sharding.check_batch(size, sharding.batch(mesh), parts)
  checks.check_conditions(config, dataset)
  checks.check_writer(config)
  checks.check_dtype(config, mesh.devices.flat[0].platform)
  source = training.training_data(config, experiment)
  previewed = previews.build(config, experiment)
  teacher, frozen = teachers.load_teacher(config, experiment)
  trainer = training.build_trainer(config, experiment.network, teacher, mesh)
  init_from = None
  if checkpoints_lib.newest(workdir) is None:
    init_from = teachers.initial_params(config, experiment, trainer, frozen)
  metric_writer.read_metrics(workdir)  # refuses a damaged file before any is written
  workdir_lib.save_or_check_config(config, workdir, dataset)
  provenance.note_versions(workdir)
  everywhere = sharding.replicated(mesh)
  key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=everywhere)()
  abstract = trainer.abstract_state()
  options = loop.LoopOptions(
    steps=config.train.steps,
    batch_size=size,
    log_every=config.train.log_every,
    save_every=config.checkpoint.every,
    sample_every=config.train.sample_every,
    evaluate_every=config.train.evaluate_every,
    skip_nonfinite=config.train.skip_nonfinite,
  )
  keep, keep_every = config.checkpoint.keep, config.checkpoint.keep_every
  spent.seconds["start"] += time.perf_counter() - begin
  with Checkpoints(workdir, keep=keep, keep_every=keep_every) as checkpoints:
    with spent.on("restore"):
      state = checkpoints.restore(abstract)
    if state is not None:
      finite.check(
        {"params": state.params, "ema": state.ema},
        f"{workdir}, checkpoint {int(state.step)}",
        "remove that checkpoint to resume from the one before",
      )
    if state is None or state.step < options.steps:
      saves = range(options.save_every, options.steps, options.save_every)
      checkpoints.check_disk(abstract, [*saves, options.steps])
    if state is None:
      state = trainer.init(key, init_from)
    del init_from
    start = int(state.step)
    if start < options.steps:
      batches = _batches(config, source, mesh, start)
      first = next(batches)
      with spent.on("compile"):
        lowered = trainer.lower(state, first, key, frozen)
        step = _compiled(lowered, config.train.executable)
      end = _run_loop(
        config,
        lambda state, batch: step(state, batch, key, frozen),
        state,
        itertools.chain([first], batches),
        checkpoints,
        options,
        workdir,
        previewed,
        spent,
      )
      if end < options.steps or (signals.received() and jax.process_count() == 1):
        raise signals.Stopped(
          f"stopped at step {end}; repeat the command to resume: {workdir}"
        )
    # A run that was killed after its last step has no summary yet.
    if start < options.steps or not summary.exists(workdir):
      flops = training.run_flops(config, experiment)
      _write_summary(config, workdir, abstract, flops, spent)
  return f"trained {options.steps} steps: {workdir}"


def _compiled(lowered: jax.stages.Lowered, file: str) -> jax.stages.Compiled:
  """Returns the compiled step, which a rehearsal may have made.

  Raises:
    UserError: the file is that of another step, or was made with other versions.
  """
  return executables.load(file, lowered) if file else lowered.compile()


def _batches(
  config: ml_collections.ConfigDict,
  dataset: Dataset,
  mesh: jax.sharding.Mesh,
  start: int,
) -> Iterator[dict]:
  """Returns the batches start, start + 1, ... on the devices."""
  batch_sharding, size = sharding.batch(mesh), config.train.batch_size
  host_batches = batches(
    dataset,
    seed=config.seed,
    batch_size=size,
    sigma_d=config.sigma_d,
    start=start,
    flip=config.train.flip,
    rows=sharding.rows(batch_sharding, size),
    shuffle_buffer=config.train.shuffle_buffer,
    num_threads=config.train.loader_threads,
  )
  return (
    sharding.make_global_batch(batch, batch_sharding, size) for batch in host_batches
  )


def _run_loop(
  config: ml_collections.ConfigDict,
  step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]],
  state: TrainState,
  batches: Iterator[dict],
  checkpoints: Checkpoints,
  options: loop.LoopOptions,
  workdir: str,
  previewed: previews.Previews,
  spent: Goodput,
) -> int:
  """Trains from the step of the state on, and returns the number of steps in total."""
  start = int(state.step)
  lines = metric_writer.read_metrics(workdir)
  seconds = [line.get("seconds") or 0.0 for line in lines if line["step"] <= start]
  spent.seconds["lost"] += goodput.lost(lines, start)
  active = jax.process_index() == 0
  first, count = config.train.profile if active and config.train.profile else (0, 0)
  if active and config.train.profiler_port:
    jax.profiler.start_server(config.train.profiler_port)
  with (
    contextlib.ExitStack() as stack,
    metric_writer.Writer(
      workdir,
      total=options.steps,
      start=start,
      active=active,
      wandb=config.writer.wandb,
      config=config.to_dict(),
    ) as writer,
    processes.stopping() as stopping,
  ):
    if active:
      goodput.write(workdir, spent)  # of a start that is killed later
      stack.callback(goodput.write, workdir, spent)
    try:
      state = loop.run(
        step,
        state,
        batches,
        writer,
        checkpoints,
        options,
        start=start,
        sample=previewed.sample,
        evaluate=previewed.evaluate,
        stopping=stopping,
        seconds=seconds[-1] if start and seconds else 0.0,
        watch=loop.Watch(
          spent=spent,
          profiler=Profiler(workdir, first, count),
          gather=processes.gather,
        ),
      )
    except FloatingPointError as error:
      raise UserError(
        f"{error}; to skip such steps, resume with config.train.skip_nonfinite=True, or "
        "train again with a lower config.optim.learning_rate"
      ) from error
  return int(state.step)


def _write_summary(
  config: ml_collections.ConfigDict,
  workdir: str,
  state: TrainState,
  flops: float,
  spent: Goodput,
) -> None:
  """Writes training.json, the cost of the run, and parameters.txt, a list of arrays."""
  if jax.process_index():
    return
  from clu import parameter_overview  # slow to import

  overview = parameter_overview.get_parameter_overview(
    state.params, include_stats=False
  )
  steps, lines = config.train.steps, metric_writer.read_metrics(workdir)
  seconds = lines[-1].get("seconds") if lines else None
  cost: summary.Summary = {
    "steps": steps,
    "images": steps * config.train.batch_size,
    "seconds": seconds,
    "parameters": sum(x.size for x in jax.tree.leaves(state.params["net"])),
    "flops": flops * steps + training.trajectory_flops(config),
    "goodput": spent.summary(seconds or 0.0),
  }
  summary.write(workdir, cost, overview)
