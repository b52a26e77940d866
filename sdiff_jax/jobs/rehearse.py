"""Job `rehearse`: what a pod will do with a config, known before it is paid for.

The very step of the other jobs is compiled for devices that are not here, of shapes
alone: no parameter is made and no data are read. What was compiled is kept in
~/.cache/sdiff_jax/rehearsals.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from sdiff_jax import registry
from sdiff_jax.capacity import chips as chips_lib
from sdiff_jax.capacity import lowering, report
from sdiff_jax.capacity.chips import Pod
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.io import file_io
from sdiff_jax.types import UserError

# Compiled as far as a run needs, a step takes longer than anyone waits; its memory,
# collectives and operations are the same.
LEVEL = "O0"
LARGEST_GROUP = 64  # of devices that a state is spread over: most arrays divide by it
ACCUMULATE = (2, 4, 8, 16, 32)  # parts of a batch that are tried


DEFAULTS = {
  "rehearse": {
    # Devices to compile for: v5e:16x16, v5p:4x4x8, h100x64, ...; several, separated by
    # commas, are compared in one table.
    "topology": "",
    "program": "train",  # a training step, or "sample": a batch or its inner iteration
    "fit": True,  # try what saves memory if the step does not fit
    # Of the data, if they are not available: (H, W, C) and the number of classes.
    "shape": (),
    "classes": 0,
  }
}


@registry.register(
  "jobs",
  "rehearse",
  defaults=DEFAULTS,
  runtime=("rehearse",),
  creates_workdir=True,
  configs_of=("train", "generate"),
  start=chips_lib.start,  # a compiler alone, on whatever machine it runs
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes rehearsal/<pod>.json and one page on all pods.

  Raises:
    UserError: an unknown pod, a compiler that is missing, or a batch that does not
      divide over it.
  """
  if config.rehearse.program not in lowering.KINDS:
    kinds = " or ".join(lowering.KINDS)
    raise UserError(
      f"config.rehearse.program={config.rehearse.program!r}: take {kinds}"
    )
  wanted = [chips_lib.parse(name) for name in config.rehearse.topology.split(",")]
  if config.model.get("dtype") == "float16" and any(p.chip != "h100" for p in wanted):
    _say("TPUs have no units for float16; take --config.model.dtype=bfloat16")
  folder = os.path.join(workdir, "rehearsal")
  os.makedirs(folder, exist_ok=True)
  found = []
  for pod in wanted:
    found.append(_rehearse(config, pod))
    path = os.path.join(folder, f"{_file(pod.name)}{_suffix(config)}.json")
    file_io.write_text(path, json.dumps(found[-1], indent=2))
  name = _file(wanted[0].name) if len(wanted) == 1 else "pods"
  path = os.path.join(folder, f"{name}{_suffix(config)}.html")
  file_io.write_text(path, report.html(found, sys.argv[1:]))
  print(report.table(found))
  return f"rehearsed: {path}"


def _file(pod: str) -> str:
  return pod.replace(":", "_")


def _suffix(config: ml_collections.ConfigDict) -> str:
  return "" if config.rehearse.program == "train" else f"_{config.rehearse.program}"


def _rehearse(config: ml_collections.ConfigDict, pod: Pod) -> dict[str, Any]:
  """Returns what is known of a pod, with the first changes that make the step fit."""
  tried = []
  for changes, on in _attempts(config, pod):
    program, facts = _attempt(config, changes, on)
    tried.append(facts | {"changes": changes})
    if fits := report.fits(facts):
      break
    _say(f"{on.name}, {_words(changes)}: does not fit")
    if not config.rehearse.fit:
      break
  if not fits:
    _say(f"{pod.name}: nothing that was tried makes it fit")
  return report.modelled(config.rehearse.program, config.train.steps, program, tried)


def _attempts(
  config: ml_collections.ConfigDict, pod: Pod
) -> Iterator[tuple[dict[str, Any], Pod]]:
  """Yields what to change, and the pod: nothing, then what saves memory, in turn."""
  yield {}, pod
  changes = {}
  if config.rehearse.program == "train":
    chips, group = pod.chips, math.gcd(pod.chips, LARGEST_GROUP)
    if config.mesh.fsdp == 1 and config.mesh.data == -1 and group > 1:
      changes["mesh.fsdp"] = group
      yield dict(changes), pod
    if config.model.get("remat", "full") != "full":
      changes["model.remat"] = "full"
      yield dict(changes), pod
    for parts in ACCUMULATE:
      divides = config.train.batch_size % (parts * chips) == 0
      if divides and parts > config.train.grad_accum_steps:
        yield changes | {"train.grad_accum_steps": parts}, pod
  while pod := chips_lib.larger(pod):
    if config.rehearse.program == "train" and config.train.batch_size % pod.chips:
      return
    yield dict(changes), pod


def _attempt(
  config: ml_collections.ConfigDict, changes: dict[str, Any], pod: Pod
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns what the program is and its facts, with some changes, on a pod."""
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  level = "" if pod.chip == "h100" else LEVEL
  key = report.key(lowering.cache_key(config), pod.name, level)
  if (kept := report.load(key)) is not None:
    return kept["program"], kept["facts"]
  devices = chips_lib.devices(pod)
  with config_errors("config.mesh"):
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
  made = lowering.build(config, mesh)
  program = made.summary()
  facts = {"pod": pod.name, "devices": len(devices), "held": made.held}
  if sum(made.held.values()) > report.capacity(pod.name, len(devices)):
    return program, facts | {"refused": "what is held from step to step is too much"}
  with report.progress(f"{pod.name}, {_words(changes)}", _say):
    jax.config.update("jax_optimization_level", level or "UNKNOWN")
    facts |= lowering.compiled(made, len(devices), gpu=pod.chip == "h100")
  report.keep(key, {"program": program, "facts": facts})
  return program, facts


def _words(changes: dict[str, Any]) -> str:
  return ", ".join(f"{k}={v}" for k, v in changes.items()) or "as it is"


def _say(text: str) -> None:
  print(f"rehearse: {text}", file=sys.stderr, flush=True)
