"""What the stages share: stored measurements, times of compiled programs, pictures."""

import concurrent.futures
import functools
import gzip
import importlib.util
import json
import os
import pathlib
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from matplotlib.figure import Figure

from sdiff_jax.capacity import chips
from sdiff_jax.io import file_io

ROOT = pathlib.Path(__file__).resolve().parents[2]
PEAK = chips.CHIPS["h100"].peak  # bfloat16 FLOP/s, of an H200 as well
Result = dict[str, Any]


class OutOfTime(Exception):
  """The call has used its seconds; the same command resumes."""


class Stage:
  """The measurements of a stage, stored after each one."""

  def __init__(
    self, name: str, out: pathlib.Path, seconds: float, tiny: bool, only: str = ""
  ):
    self.name, self.out, self.tiny, self.only = name, out, tiny, only
    self.train_seconds = 0.4 * seconds
    self.deadline = time.monotonic() + seconds
    self.path = out / f"{name}.partial.json"
    self.results: dict[str, Result] = {}
    if self.path.exists():
      self.results = json.loads(self.path.read_text())

  def remaining(self) -> float:
    """Returns the seconds that this call may still use."""
    return self.deadline - time.monotonic()

  def measure(self, name: str, function: Callable[[], Result]) -> Result:
    """Returns the stored result of a measurement, or measures and stores it.

    A failure is stored as `error`: the other measurements do not depend on it.
    """
    if name not in self.results:
      if self.remaining() < 0:
        raise OutOfTime(name)
      begin = time.monotonic()
      try:
        result = function()
      except OutOfTime:
        raise
      except Exception as error:
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        result["error"] = result["error"][:400]
      result["wall_seconds"] = round(time.monotonic() - begin, 2)
      self.results[name] = result
      file_io.write_text(self.path, json.dumps(self.results, indent=2))
      print(f"{name}: {json.dumps(result)}", flush=True)
    return self.results[name]


def median_seconds(call: Callable[[], Any], repeats: int = 10) -> float:
  """Returns the median time of a call; the first two calls are not counted."""
  seconds = []
  for _ in range(repeats + 2):
    begin = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds[2:])


def cost(seconds: float, flops: float, batch_size: int) -> Result:
  """Returns milliseconds, samples per second and the fraction of the peak FLOP/s."""
  return {
    "ms": 1e3 * seconds,
    "samples_per_second": batch_size / seconds,
    "tflop": flops / 1e12,
    "fraction_of_peak": flops / seconds / PEAK,
  }


def random_arrays(shapes: Any) -> Any:
  """Returns arrays of given shapes: small positive numbers, zeros and keys.

  A compiled generator would take longer to compile than the program that is timed.
  """
  # Not negative, since second moments of an optimizer are among them.
  values = 0.02 * np.abs(np.random.default_rng(0).standard_normal(1 << 20))

  def array(s: Any) -> jax.Array:
    if jnp.issubdtype(s.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    if jnp.issubdtype(s.dtype, jnp.floating):
      return jax.device_put(np.resize(values.astype(s.dtype), s.shape))
    return jax.device_put(np.zeros(s.shape, s.dtype))

  return jax.tree.map(array, shapes)


def kernel_seconds(call: Callable[[], Any]) -> Result:
  """Returns the number and the total seconds of each kernel of the GPU in a call."""
  kernels: Result = {}
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = options.host_tracer_level = 0  # the GPU alone
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      call()
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
      for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines if plane.name.startswith("/device:GPU") else ():
          for event in line.events if line.name.startswith("Stream") else ():
            # Not its hlo_op, which for many kernels is the command buffer around them.
            kernel = kernels.setdefault(event.name, {"number": 0, "seconds": 0.0})
            kernel["number"] += 1
            kernel["seconds"] += event.duration_ns / 1e9
  return kernels


class Case(NamedTuple):
  """A program to compile and to time: its name, lowered form, FLOPs and batch size."""

  name: str
  lowered: Callable[[], jax.stages.Lowered]
  flops: Callable[[], float]
  batch_size: int
  time: Callable[[jax.stages.Compiled, Any], float]


def kernels_file(stage: Stage, name: str) -> pathlib.Path:
  """Returns the path, without a suffix, of a case's program and of its kernels."""
  return stage.out / "kernels" / name.replace("/", "-").replace(" ", "_")


def run_cases(stage: Stage, cases: list[Case]) -> None:
  """Compiles the cases that have no result, side by side, and times one after another."""
  cases = [case for case in cases if re.search(stage.only, case.name)]
  missing = [case for case in cases if case.name not in stage.results]
  if missing and stage.remaining() < 0:
    raise OutOfTime(missing[0].name)

  def compiled(case: Case) -> Any:
    begin = time.monotonic()
    lowered = case.lowered()
    return lowered.compile(), lowered.args_info[0], time.monotonic() - begin

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    programs = {case.name: pool.submit(compiled, case) for case in missing}
    concurrent.futures.wait(programs.values())

  def timed(case: Case) -> Result:
    program, shapes, compile_seconds = programs[case.name].result()
    seconds = case.time(program, random_arrays(shapes))
    memory = program.memory_analysis()
    file = kernels_file(stage, case.name)
    file.parent.mkdir(exist_ok=True)
    with gzip.open(f"{file}.hlo.txt.gz", "wt") as text:
      text.write(program.as_text())
    kernels = kernel_seconds(lambda: case.time(program, random_arrays(shapes)))
    file_io.write_json(f"{file}.json", kernels)
    return cost(seconds, case.flops(), case.batch_size) | {
      "gigabytes": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
      "compile_seconds": compile_seconds,
      "kernels": sum(kernel["number"] for kernel in kernels.values()),
      "kernel_ms": 1e3 * sum(kernel["seconds"] for kernel in kernels.values()),
    }

  for case in missing:
    stage.measure(case.name, functools.partial(timed, case))


def load(name: str, variant: str = "") -> ml_collections.ConfigDict:
  """Returns the config of configs/NAME.py:VARIANT."""
  get_config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
  return get_config(variant) if variant else get_config()


def compare_with_torch(stage: Stage, script: str, name: str, *arguments: Any) -> None:
  """Runs a script of third_party/ where PyTorch can be imported, in its own process."""

  if not re.search(stage.only, name):
    return

  def run() -> Result:
    needs = ["torch", "diffusers"] if "diffusers" in script else ["torch"]
    for module in needs:
      if importlib.util.find_spec(module) is None:
        return {"not run": f"{module} is not installed"}
    if not (ROOT / "third_party" / script).exists():
      return {"not run": f"there is no third_party/{script}"}
    command = [sys.executable, str(ROOT / "third_party" / script)]
    command += [str(argument) for argument in arguments]
    command += ["--tiny"] * stage.tiny
    limit = max(stage.remaining() - 60, 30)
    command.append(f"--seconds={limit}")
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(stage.out / "inductor")}
    done = subprocess.run(
      command,
      capture_output=True,
      text=True,
      timeout=limit + 30,
      env=os.environ | cache,
    )
    if done.returncode:
      return {"error": done.stderr.strip()[-400:]}
    return {"rows": json.loads(done.stdout.splitlines()[-1])}

  stage.measure(name, run)


def bars(stage: Stage, label: str, rows: dict[str, Result], field: str) -> None:
  """Draws one horizontal bar for each row into STAGE.png."""
  figure = Figure(figsize=(7, 0.6 + 0.3 * len(rows)), layout="constrained")
  axes = figure.subplots()
  axes.barh([*rows], [row[field] for row in rows.values()])
  axes.invert_yaxis()
  axes.set_xlabel(label)
  figure.savefig(stage.out / f"{stage.name}.png", dpi=130)
