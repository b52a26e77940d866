"""Stage `train`: a teacher on Fashion-MNIST, its student, and both measured."""

import concurrent.futures
import contextlib
import functools
import importlib
import json
import os
import pathlib
import shutil
import signal
import statistics
import threading
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np
import safetensors.numpy
from matplotlib.figure import Figure
from PIL import Image

from h100_stages.shared import OutOfTime, Result, Stage, load
from sdiff_jax import config as config_lib
from sdiff_jax import registry
from sdiff_jax.distributed import signals
from sdiff_jax.experiment import evaluation
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.io import image_io

ROWS = 5  # of each class in the figure


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
