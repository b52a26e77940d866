"""Job `rehearse`: memory, traffic and modeled time of a config on a pod.

The program of the other jobs is compiled for the devices of the pod, which are not
needed: arrays are abstract, and no data are read. Facts of compiled programs are cached
in ~/.cache/sdiff_jax/rehearsals.
"""

import contextlib
import dataclasses
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Annotated

import jax
import ml_collections

from sdiff_jax import registry
from sdiff_jax.capacity import cache, lowering, page, report
from sdiff_jax.capacity import chips as chips_lib
from sdiff_jax.capacity.chips import Pod
from sdiff_jax.capacity.report import Job
from sdiff_jax.distributed import executables, sharding
from sdiff_jax.experiment import programs
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.fields import Choices, Length, Range
from sdiff_jax.io import file_io
from sdiff_jax.types import Json, UserError

# Full optimization needs many times longer; memory, collectives and operations are the
# same.
LEVEL = "O0"
MAX_FSDP = 64  # devices that the state is sharded over: most arrays divide by it
PROGRESS_SECONDS = 30  # between two lines of progress
GRAD_ACCUM_STEPS = (2, 4, 8, 16, 32)  # that are tried


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rehearse:
  """The devices and the program that are planned for.

  Attributes:
    topology: devices to compile for: v5e:16x16, v5p:4x4x8, v6e-256, 2xv5e:16x16 (two
      slices), h100x64, ...; several, separated by commas, are compared in one table.
    program: "train" is a training step, "sample" a batch of samples or its inner
      iteration.
    fit: whether changes that save memory are tried if the step does not fit.
    shape: (H, W, C) of the data, if they are not available.
    classes: number of classes of the data, if they are not available.
    save: file for the compiled training step, from which the job `train` starts without
      compiling (train.executable); "" for none. TPUs alone: programs for GPUs are tuned
      on the GPU.
    dollars_per_chip_hour: price, of which the report makes that of the run.
  """

  topology: str = ""
  program: Annotated[str, Choices(programs.KINDS)] = "train"
  fit: bool = True
  shape: Annotated[tuple[int, ...], Range(1, 65_536), Length(0, 3)] = ()
  classes: Annotated[int, Range(0, 1_000_000)] = 0
  save: str = ""
  dollars_per_chip_hour: Annotated[float, Range(0, 1_000_000)] = 0.0


@registry.register(
  "jobs",
  "rehearse",
  sections={"rehearse": Rehearse},
  runtime=("rehearse",),
  creates_workdir=True,
  configs_of=("train", "generate"),
  shares_workdir=True,
  start=chips_lib.start,  # a compiler alone, on whatever machine it runs
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes rehearsal/<pod>.json and a page about all pods.

  Raises:
    UserError: an unknown pod, a compiler that is not installed, or a batch that does not
      divide over the devices.
  """
  with config_errors("config.rehearse"):
    pods = [chips_lib.parse(name) for name in config.rehearse.topology.split(",")]
  _check_save(config, pods)
  if config.model.get("dtype") == "float16" and any(p.chip != "h100" for p in pods):
    _say("TPUs have no float16 units; use --config.model.dtype=bfloat16")
  folder = os.path.join(workdir, "rehearsal")
  reports = []
  for pod in pods:
    reports.append(_rehearse(config, pod))
    path = os.path.join(folder, f"{_file(pod.name)}{_suffix(config)}.json")
    file_io.write_json(path, reports[-1])
  name = _file(pods[0].name) if len(pods) == 1 else "pods"
  path = os.path.join(folder, f"{name}{_suffix(config)}.html")
  file_io.write_text(path, page.html(reports, sys.argv[1:]))
  print(page.table(reports))
  return f"rehearsed: {path}"


def _check_save(config: ml_collections.ConfigDict, pods: list[Pod]) -> None:
  """Checks that there is one program to save, whose pod takes it.

  Raises:
    UserError: there are several pods, GPUs, or no training step.
  """
  if not config.rehearse.save:
    return
  name = f"config.rehearse.save={config.rehearse.save}"
  if len(pods) > 1 or config.rehearse.program != "train" or config.job == "generate":
    raise UserError(f"{name}: is the training step for one topology")
  if pods[0].chip == "h100":
    raise UserError(
      f"{name}: programs for GPUs are tuned on the GPU; keep a JAX_COMPILATION_CACHE_DIR"
    )


def _save(config: ml_collections.ConfigDict, pod: Pod) -> None:
  """Compiles the training step as `train` does, and writes it."""
  mesh = sharding.make_mesh(**config.mesh, devices=chips_lib.devices(pod))
  lowered = programs.build(config, mesh).lower()
  with _progress(f"{pod.name}, to save it"):
    jax.config.update("jax_optimization_level", "UNKNOWN")
    executables.save(config.rehearse.save, lowered)


def _file(pod: str) -> str:
  return pod.replace(":", "_")


def _suffix(config: ml_collections.ConfigDict) -> str:
  return "" if config.rehearse.program == "train" else f"_{config.rehearse.program}"


def _rehearse(config: ml_collections.ConfigDict, pod: Pod) -> dict[str, Json]:
  """Returns the report of a pod, with the first changes that make the program fit."""
  attempts = []
  for changes, attempt_pod in _attempts(config, pod):
    program, facts = _attempt(config, changes, attempt_pod)
    attempts.append(facts | {"changes": changes})
    if fits := report.fits(facts):
      break
    _say(f"{attempt_pod.name}, {_text(changes)}: does not fit")
    if not config.rehearse.fit:
      break
  if not fits:
    _say(f"{pod.name}: does not fit with any of the changes")
  elif config.rehearse.save and attempt_pod == pod:
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    _save(changed, pod)
  job = Job(
    config.rehearse.program, config.train.steps, config.rehearse.dollars_per_chip_hour
  )
  return report.model(job, program, attempts)


def _attempts(
  config: ml_collections.ConfigDict, pod: Pod
) -> Iterator[tuple[dict[str, Json], Pod]]:
  """Yields changes of config fields that save memory, and pods, from the mildest on."""
  yield {}, pod
  changes = {}
  if config.rehearse.program == "train":
    chips, group = pod.chips, math.gcd(pod.chips, MAX_FSDP)
    if config.mesh.fsdp == 1 and config.mesh.data == -1 and group > 1:
      changes["mesh.fsdp"] = group
      yield dict(changes), pod
    if config.model.get("remat", "full") != "full":
      changes["model.remat"] = "full"
      yield dict(changes), pod
    for parts in GRAD_ACCUM_STEPS:
      divides = config.train.batch_size % (parts * chips) == 0
      if divides and parts > config.train.grad_accum_steps:
        yield changes | {"train.grad_accum_steps": parts}, pod
  while pod := chips_lib.larger(pod):
    if config.rehearse.program == "train" and config.train.batch_size % pod.chips:
      return
    yield dict(changes), pod


def _attempt(
  config: ml_collections.ConfigDict, changes: dict[str, Json], pod: Pod
) -> tuple[dict[str, Json], dict[str, Json]]:
  """Returns the summary of a program and its facts, with changes of config fields."""
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  gpu = pod.chip == "h100"
  level = "" if gpu else LEVEL
  with config_errors("config.rehearse"):
    devices = chips_lib.devices(pod)
  with config_errors("config.mesh"):
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
  program = programs.build(config, mesh)
  facts = {
    "pod": pod.name,
    "devices": len(devices),
    "persistent_bytes": program.persistent_bytes,
  }
  available = report.memory_per_device(pod.name, len(devices))
  if sum(program.persistent_bytes.values()) > available:
    return program.summary(), facts | {"error": "the persistent arrays do not fit"}
  lowered = program.lower()
  key = cache.key(lowered, pod.name, level)
  if (analysis := cache.load(key)) is None:
    with _progress(f"{pod.name}, {_text(changes)}"):
      jax.config.update("jax_optimization_level", level or "UNKNOWN")
      analysis = lowering.analyze(program, lowered, len(devices), gpu=gpu)
    cache.save(key, analysis)
  return program.summary(), facts | analysis


@contextlib.contextmanager
def _progress(name: str) -> Iterator[None]:
  """Reports every PROGRESS_SECONDS that a compilation is running."""
  done, begin = threading.Event(), time.monotonic()

  def tick() -> None:
    while not done.wait(PROGRESS_SECONDS):
      _say(f"compiling for {name}, {time.monotonic() - begin:.0f} s")

  _say(f"compiling for {name}; a large network needs minutes")
  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _text(changes: dict[str, Json]) -> str:
  return ", ".join(f"{k}={v}" for k, v in changes.items()) or "unchanged"


def _say(text: str) -> None:
  print(f"rehearse: {text}", file=sys.stderr, flush=True)
