"""Stage `step`: training steps of EDM2-S and DiT-XL/2."""

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from h100_stages.shared import (
  Case,
  Stage,
  bars,
  compare_with_torch,
  load,
  median_seconds,
  run_cases,
)
from sdiff_jax.capacity import lowering
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import programs


def step_configs(stage: Stage) -> Iterator[tuple[str, ml_collections.ConfigDict]]:
  """Yields names and configs of the training steps to time."""
  variant = "S,tiny" if stage.tiny else "S"
  for batch_size in (16,) if stage.tiny else (128, 32):
    for loss in ("diffusion",) if stage.tiny else ("diffusion", "scd"):
      config = load(f"imagenet512_{loss}", variant)
      config.model.dtype = "bfloat16"
      config.train.batch_size = batch_size
      yield f"EDM2-S {loss} batch {batch_size}", config
  for tokens, side in ((64, 8),) if stage.tiny else ((256, 32), (1024, 64)):
    for loss in ("scd",) if stage.tiny else ("diffusion", "scd"):
      config = load(f"imagenet256_dit_{loss}", "tiny" if stage.tiny else "")
      if not stage.tiny:
        config.rehearse.update(shape=(side, side, 4), classes=1000)
        # PyTorch's half computes nothing twice either.
        config.model.update(patch=2, width=1152, depth=28, heads=16, remat="")
        config.train.batch_size = 32
      yield f"DiT-XL/2 {loss} {tokens} tokens", config


def write_teacher(
  config: ml_collections.ConfigDict, variant: str, workdir: pathlib.Path
) -> None:
  """Writes a work directory of config.json alone: the teacher that a student expects."""
  file = pathlib.Path(config.teacher.config.partition(":")[0]).stem
  teacher = load(file, variant)
  shared = {*teacher.model} & {*config.model} - {"guidance", "dropout"}
  teacher.model.update({name: config.model[name] for name in shared})
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(json.dumps(teacher.to_dict()))
  config.teacher.workdir = str(workdir)


def time_step(program: jax.stages.Compiled, arguments: Any) -> float:
  """Returns the seconds of a step whose state is donated, as in training."""
  state, *rest = arguments

  def call() -> Any:
    nonlocal state
    state, metrics = program(state, *rest)
    return metrics

  return median_seconds(call)


def step_case(stage: Stage, name: str, config: ml_collections.ConfigDict) -> Case:
  """Returns the case of a config's training step on the devices that are here."""
  if config.teacher.config:
    variant = config.teacher.config.partition(":")[2]
    write_teacher(config, variant, stage.out / "teachers" / name.replace("/", "-"))

  @functools.cache
  def program() -> lowering.Program:
    return programs.build(config, sharding.make_mesh())

  return Case(
    name,
    lambda: program().lower(),
    lambda: program().flops(False),
    config.train.batch_size,
    time_step,
  )


def step(stage: Stage, data: pathlib.Path) -> None:
  """Times training steps of EDM2-S and DiT-XL/2."""
  del data  # noise
  compare_with_torch(stage, "torch_networks.py", "PyTorch steps")
  cases = [step_case(stage, name, config) for name, config in step_configs(stage)]
  run_cases(stage, cases)
  rows = {k: v for k, v in stage.results.items() if "fraction_of_peak" in v}
  bars(stage, "fraction of the peak FLOP/s", rows, "fraction_of_peak")
