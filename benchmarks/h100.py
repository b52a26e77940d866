"""Measurements on a machine with one GPU, prepared so that a short loan is enough.

  python benchmarks/h100.py --stage=train --out=runs/h100 [--data=PATH]
  python benchmarks/h100.py --stage=step --out=runs/h100
  python benchmarks/h100.py --stage=sampler --out=runs/h100
  python benchmarks/h100.py --stage=calibrate --out=runs/h100
  python benchmarks/h100.py --stage=attention --out=runs/h100

Every stage writes STAGE.json and its pictures into --out. A call stops after --seconds;
the same command then resumes, and a finished stage is skipped unless --force is given.
--tiny rehearses a stage on a CPU in seconds. Only this repository and JAX are needed;
PyTorch and diffusers are timed beside ours where they can be imported.

  train      trains a teacher on Fashion-MNIST, distills it with sCD, and measures both
  step       times training steps of EDM2-S and of DiT-XL/2 against the peak FLOP/s
  sampler    times the U-Net of Stable Diffusion 2 and iterations of ParaDDPM-1000
  calibrate  measures the constants of the model of time (memory, launches, products)
  attention  checks and times attention with a tangent (see benchmarks/attention.py)
"""

import argparse
import concurrent.futures
import contextlib
import functools
import gzip
import importlib
import importlib.util
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Other processes (PyTorch's) use the same GPU before JAX does.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors.numpy
from matplotlib.figure import Figure
from PIL import Image

from sdiff_jax import config as config_lib
from sdiff_jax import registry
from sdiff_jax.capacity import chips, lowering
from sdiff_jax.distributed import sharding, signals
from sdiff_jax.experiment import evaluation, programs
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.io import file_io, image_io
from sdiff_jax.pretrained.diffusers import loading
from sdiff_jax.training import flops as flops_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")
PEAK = chips.CHIPS["h100"].peak  # bfloat16 FLOP/s, of an H200 as well
ROWS = 5  # of each class in the figure of stage `train`
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
    file = stage.out / "kernels" / case.name.replace("/", "-").replace(" ", "_")
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


# --- train ---------------------------------------------------------------------------


def load(name: str, variant: str = "") -> ml_collections.ConfigDict:
  """Returns the config of configs/NAME.py:VARIANT."""
  get_config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
  return get_config(variant) if variant else get_config()


def fashion(name: str, data: pathlib.Path, tiny: bool) -> ml_collections.ConfigDict:
  """Returns configs/fashion_unet_NAME.py on the images of a path."""
  c = load(f"fashion_unet_{name}")
  c.data.dir = c.reference.dir = str(data)
  c.sample.update(num=64, batch_size=64)
  if tiny:
    c.data = config_lib.component("data", "digits")
    c.reference = ml_collections.ConfigDict({"name": ""})
    c.model.update(channels=8, channel_mult=(1, 2), blocks=1, head_channels=8)
    c.model.attn_resolutions = (4,)
    c.train.update(batch_size=16, log_every=1)
    c.evaluate.update(features="digits", num=64, batch_size=64, pr_num_images=64)
    c.sampler.update(steps=2)
    if name == "diffusion":
      c.evaluate.samplers = ("heun/2", "consistency/1")
  return c


def run_job(name: str, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
  """Runs a job in this process, as `main` does."""
  config_lib.validate(config)
  job = importlib.import_module(f"sdiff_jax.jobs.{name}")
  return job.run(config, str(workdir))


@contextlib.contextmanager
def stop_after(seconds: float) -> Iterator[None]:
  """Sends this process SIGTERM, on which a training run saves a checkpoint and ends."""
  timer = threading.Timer(max(seconds, 1.0), os.kill, (os.getpid(), signal.SIGTERM))
  before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
    signal.signal(signal.SIGTERM, before)


def evaluated(
  stage: Stage, config: ml_collections.ConfigDict, role: str, checkpoint: int = 0
) -> Result:
  """Evaluates a checkpoint of a run, 0 for the newest; its pictures go into --out."""
  config = config.copy_and_resolve_references()
  config.sample.checkpoint = checkpoint
  run_job("evaluate", config, stage.out / role)
  folder = stage.out / role / evaluation.results_folder(config)
  for picture in folder.glob("*.png"):
    shutil.copyfile(
      picture, stage.out / f"train_{role}{checkpoint or ''}_{picture.name}"
    )
  return {"rows": json.loads((folder / "results.json").read_text())}


def export_weights(stage: Stage, role: str) -> Result:
  """Writes the averaged weights of a run in half precision, in files below 10 MB."""
  config = workdir_lib.read(str(stage.out / role))
  _, params = workdir_lib.trained(config, str(stage.out / role))
  tensors = {
    jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x, np.float16)
    for path, x in jax.tree_util.tree_leaves_with_path(params)
  }
  names = sorted(tensors)
  parts = -(-sum(x.nbytes for x in tensors.values()) // 10_000_000)
  for part in range(parts):
    chunk = {name: tensors[name] for name in names[part::parts]}
    safetensors.numpy.save_file(chunk, stage.out / f"{role}{part}.safetensors")
  return {"files": parts, "parameters": sum(x.size for x in tensors.values())}


def train(stage: Stage, data: pathlib.Path) -> None:
  """Trains a teacher and distills it, and measures both, the student as it trains.

  The teacher gets 40% of the call's seconds, the student 60% of the teacher's FLOPs.
  """
  teacher = fashion("diffusion", data, stage.tiny)
  size = teacher.train.batch_size

  def measured_step() -> Result:
    config, workdir = teacher.copy_and_resolve_references(), stage.out / "step"
    shutil.rmtree(workdir, ignore_errors=True)
    config.train.update(steps=4 if stage.tiny else 60, log_every=2)
    run_job("train", config, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line).get("images_per_second") for line in lines]
    rate = statistics.median([rate for rate in rates if rate][len(rates) // 2 :])
    return {"images_per_second": rate, "steps": int(stage.train_seconds * rate / size)}

  def trained(config: ml_collections.ConfigDict, role: str) -> Result:
    try:
      with stop_after(stage.remaining() - 10):
        run_job("train", config, stage.out / role)
    except signals.Stopped as error:
      raise OutOfTime(str(error)) from error
    return json.loads((stage.out / role / "training.json").read_text())

  steps = 4 if stage.tiny else stage.measure("teacher step", measured_step)["steps"]
  teacher.train.steps = steps
  if "error" in stage.measure("teacher training", lambda: trained(teacher, "teacher")):
    return
  student = fashion("scd", data, stage.tiny)
  student.teacher.workdir = str(stage.out / "teacher")
  # A step of sCD costs 1.65 steps of the teacher: checkpoints at 10%, ..., 60%.
  every = max(round(0.1 * steps / 1.65), 1)
  student.train.steps = 6 * every
  student.checkpoint.update(every=every, keep_every=every)
  # The teacher is evaluated while the student trains.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    rows = None
    if "teacher distances" not in stage.results:
      rows = pool.submit(evaluated, stage, teacher, "teacher")
    result = stage.measure("scd training", lambda: trained(student, "scd"))
    if rows:
      stage.measure("teacher distances", rows.result)
  if "error" in result:
    return
  for tenths in (1, 2, 4, 6):
    measure = functools.partial(evaluated, stage, student, "scd", tenths * every)
    stage.measure(f"scd distances at {tenths}0%", measure)
  for role in ("teacher", "scd"):
    measure = functools.partial(export_weights, stage, role)
    stage.measure(f"{role} weights", measure)
  draw_curve(stage)
  draw_images(stage, student)


def draw_curve(stage: Stage) -> None:
  """Draws the student's distance over its teacher's, against training FLOPs."""
  teacher = stage.results["teacher distances"]["rows"][0]["frechet"]
  rows = [r for v in stage.results.values() for r in v.get("rows", ())]
  figure = Figure(figsize=(5, 3.4), layout="constrained")
  axes = figure.subplots()
  for steps in (1, 2):
    of_steps = [r for r in rows if r["sampler"] == f"consistency/{steps}"]
    students = [r for r in of_steps if r["model"] == "sCD"]
    axes.plot(
      [100 * r["compute"] for r in students],
      [r["frechet"] / teacher for r in students],
      marker="o",
      label=f"sCD, {steps} step{'s' * (steps > 1)}",
    )
  axes.axhline(1, color="gray", linestyle=":")
  axes.set_xlabel("training FLOPs, % of the teacher's")
  axes.set_ylabel("Fréchet distance / teacher's")
  axes.legend()
  figure.savefig(stage.out / "train_curve.png", dpi=130)


def draw_images(stage: Stage, config: ml_collections.ConfigDict) -> None:
  """Draws held-out images, and images of teacher and student from the same noise."""
  section = "reference" if config.reference.name else "data"
  dataset = registry.build("data", config[section].to_dict(), f"config.{section}")
  pixels, cond = dataset[np.arange(min(1000, dataset.size))]
  labels = np.asarray(cond["label"])
  classes = [np.flatnonzero(labels == label)[:ROWS] for label in range(10)]
  real = image_io.grid(pixels[np.stack(classes, 1).ravel()], 10)
  stem = f"train_scd{config.train.steps}_consistency"
  files = {f"{stem}-1.png": "sCD, 1 step", f"{stem}-2.png": "sCD, 2 steps"}
  teacher = next(stage.out.glob("train_teacher_heun-*.png"))
  files = {teacher.name: f"teacher, heun/{teacher.stem.split('-')[-1]}"} | files
  panels = {"held-out images": real} | {
    title: np.asarray(Image.open(stage.out / file))[: real.shape[0]]
    for file, title in files.items()
  }
  figure = Figure(figsize=(11, 6), layout="constrained")
  for axes, (title, panel) in zip(
    figure.subplots(2, 2).ravel(), panels.items(), strict=True
  ):
    axes.imshow(panel)
    axes.set_title(title)
    axes.set_axis_off()
  figure.savefig(stage.out / "train.png", dpi=130)


# --- step ----------------------------------------------------------------------------


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


def step(stage: Stage, data: pathlib.Path) -> None:
  """Times training steps of EDM2-S and DiT-XL/2."""
  del data  # noise
  compare_with_torch(stage, "torch_networks.py", "PyTorch steps")
  mesh, cases = sharding.make_mesh(), []
  for name, config in step_configs(stage):
    if config.teacher.config:
      variant = config.teacher.config.partition(":")[2]
      write_teacher(config, variant, stage.out / "teachers" / name.replace("/", "-"))

    @functools.cache
    def program(config=config) -> lowering.Program:
      return programs.build(config, mesh)

    cases.append(
      Case(
        name,
        lambda program=program: program().lower(),
        lambda program=program: program().flops(False),
        config.train.batch_size,
        time_step,
      )
    )
  run_cases(stage, cases)
  rows = {k: v for k, v in stage.results.items() if "fraction_of_peak" in v}
  bars(stage, "fraction of the peak FLOP/s", rows, "fraction_of_peak")


# --- sampler -------------------------------------------------------------------------


def sampler(stage: Stage, data: pathlib.Path) -> None:
  """Times the U-Net of Stable Diffusion 2 and iterations of ParaDDPM-1000."""
  del data
  folder = ROOT / "configs" / "published" / "stable_diffusion2"
  batches, windows, steps = (1, 2, 16, 48), (16, 32, 48, 80), 1000
  if stage.tiny:
    folder = ROOT / "tests" / "fixtures" / "tiny-sd2"
    batches, windows, steps = (1, 2), (4,), 8
  compare_with_torch(
    stage, "diffusers_unet.py", "diffusers calls", str(folder), *batches
  )
  model = loading.abstract(loading.configs(str(folder)), dtype="bfloat16")
  unet, length = model.unet, model.text_encoder.length

  def call(params: Any, x: Any, t: Any, text: Any) -> Any:
    return unet.apply(params, x, t, {"text": text})

  def arguments(n: int) -> tuple[Any, ...]:
    shapes = (n, *unet.shape), (n,), (n, length, unet.text)
    x, t, text = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return model.params["unet"], x, t, text

  cases = [
    Case(
      f"call batch {n}",
      lambda n=n: jax.jit(call).lower(*arguments(n)),
      lambda n=n: flops_lib.count_flops(call, *arguments(n)),
      n,
      lambda program, arrays: median_seconds(lambda: program(*arrays)),
    )
    for n in batches
  ]
  for window in windows:
    config = load("stable_diffusion2", "ddpm")
    config.generate.update(folder=str(folder), dtype="bfloat16")
    # Every change is below this tolerance: an iteration advances by a whole window.
    config.sampler.update(steps=steps, window=window, tolerance=1e6)
    config.sample.batch_size = jax.device_count()
    program = programs.build(config, sharding.make_mesh())
    cases.append(
      Case(
        f"ParaDDPM-{steps} window {window}",
        program.lower,
        lambda program=program: program.flops(False),
        window,
        iteration_seconds,
      )
    )
  run_cases(stage, cases)
  rows = {k: v for k, v in stage.results.items() if "samples_per_second" in v}
  for row in rows.values():
    row["ms_per_sample"] = 1e3 / row["samples_per_second"]
  bars(stage, "ms per evaluation", rows, "ms_per_sample")


def iteration_seconds(program: jax.stages.Compiled, arrays: Any) -> float:
  """Returns the seconds of a parallel iteration: of a whole sample over their number."""
  _, samples = program(*arrays)
  iterations = int(jnp.max(samples.num_iterations))
  begin = time.perf_counter()
  jax.block_until_ready(program(*arrays))
  return (time.perf_counter() - begin) / iterations


# --- calibrate -----------------------------------------------------------------------


def calibrate(stage: Stage, data: pathlib.Path) -> None:
  """Measures the constants of the model of time: memory, launches and products."""
  del data
  size = 1_000 if stage.tiny else 1_000_000_000

  def copy() -> Result:
    x, add = jnp.ones(size, jnp.float32), jax.jit(lambda x: x + 1)
    seconds = median_seconds(lambda: add(x))
    return {"gigabytes_per_second": 8 * size / seconds / 1e9}

  def launch() -> Result:
    def chain(x: jax.Array, number: int) -> jax.Array:
      for _ in range(number):
        x = jax.lax.optimization_barrier(x + 1)
      return x

    x, seconds = jnp.ones(128), {}
    for number in (10, 510):
      call = jax.jit(functools.partial(chain, number=number))
      seconds[number] = median_seconds(lambda call=call: call(x), 50)
    return {"microseconds": 1e6 * (seconds[510] - seconds[10]) / 500}

  def product(n: int, k: int) -> Result:
    a = random_arrays(jax.ShapeDtypeStruct((n, k), jnp.bfloat16))
    gram = jax.jit(lambda a: a @ a.T)
    seconds = median_seconds(lambda: gram(a), 20)
    return cost(seconds, 2 * n * n * k, n)

  stage.measure("copy", copy)
  stage.measure("launch", launch)
  for n, k in ((64, 64),) if stage.tiny else ((8192, 8192), (4096, 4096), (8192, 512)):
    stage.measure(f"product {n} x {k}", functools.partial(product, n, k))


# --- attention -----------------------------------------------------------------------


def attention(stage: Stage, data: pathlib.Path) -> None:
  """Checks attention against float64 and times it."""
  del data
  sys.path.insert(0, str(ROOT / "benchmarks"))
  bench = importlib.import_module("attention")
  lengths = (64,) if stage.tiny else (1024, 4096, 16384)
  checked = ((32, {"causal": True}),) if stage.tiny else bench.CHECKED
  stage.measure("errors", lambda: {"rows": list(bench.errors(checked))})
  repeats = 2 if stage.tiny else 20
  for length in lengths:
    stage.measure(
      f"{length} tokens",
      lambda length=length: {"rows": [*bench.times([length], repeats)]},
    )
  rows = {
    f"{row['work']}, {row['implementation']}, {row['length']}": row
    for length in lengths
    for row in stage.results[f"{length} tokens"].get("rows", [])
    if "median_ms" in row
  }
  bars(stage, "median ms", rows, "median_ms")


# --- what the stages share -----------------------------------------------------------


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


STAGES = {
  function.__name__: function
  for function in (train, step, sampler, calibrate, attention)
}


def data_folder(given: str, tiny: bool) -> pathlib.Path | None:
  """Returns the .npz or the folder of Fashion-MNIST, None where there is neither."""
  path = pathlib.Path(given) if given else FASHION
  return path if tiny or path.exists() else None


def run_stage(name: str, options: argparse.Namespace) -> str:
  """Runs a stage until it is finished or out of time, and returns a line about it."""
  out = options.out.resolve()
  final = out / f"{name}.json"
  if final.exists() and not options.force:
    return f"{name}: finished before, see {final}; --force measures again"
  if not options.tiny and jax.default_backend() != "gpu":
    return f"{name}: not run: no GPU"
  data = data_folder(options.data, options.tiny)
  if name == "train" and data is None:
    return f"{name}: not run: no Fashion-MNIST in {options.data or FASHION}; see --data"
  out.mkdir(parents=True, exist_ok=True)
  if options.force:
    (out / f"{name}.partial.json").unlink(missing_ok=True)
    for folder in ("teacher", "scd", "step") if name == "train" else ():
      shutil.rmtree(out / folder, ignore_errors=True)
  if not options.tiny:
    jax.config.update("jax_compilation_cache_dir", str(out / "xla"))
  stage = Stage(name, out, options.seconds, options.tiny, options.only)
  machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
  begin = time.monotonic()
  try:
    STAGES[name](stage, data or FASHION)
  except OutOfTime as error:
    return f"{name}: out of time at {error}; the same command resumes"
  if options.only:
    return f"{name}: measured what --only names, see {stage.path}"
  file_io.write_text(final, json.dumps(machine | stage.results, indent=2))
  stage.path.unlink(missing_ok=True)
  return f"{name}: finished in {time.monotonic() - begin:.0f} s, see {final}"


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--stage", choices=[*STAGES, "all"], required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--data", default="", help=".npz or IDX folder of Fashion-MNIST")
  parser.add_argument("--seconds", type=float, default=240, help="of this call")
  parser.add_argument("--only", default="", help="regular expression of names of cases")
  parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU")
  parser.add_argument("--force", action="store_true", help="measure again")
  options = parser.parse_args(arguments)
  for name in STAGES if options.stage == "all" else (options.stage,):
    print(run_stage(name, options), flush=True)


if __name__ == "__main__":
  main()
