"""Job `generate`: generates images by a pretrained model in the diffusers format.

Each image is a PNG that holds its prompt, its seed, its settings and its cost, so the
images themselves tell which ones are missing, and which were made with other settings.
"""

import concurrent.futures
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from sdiff_jax import registry
from sdiff_jax.data import folder
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import (
  conditions,
  described_images,
  pipelines,
  published_model,
  start_images,
  text_to_image,
)
from sdiff_jax.experiment.described_images import Images
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.experiment.pipelines import CompiledSampler, Pipeline
from sdiff_jax.fields import Choices, HubPath, Length, Path, Range
from sdiff_jax.io import file_io, image_io, resumable
from sdiff_jax.io.progress import Progress
from sdiff_jax.pretrained.diffusers import prompts as prompts_lib
from sdiff_jax.samplers import Sampler, SamplingStats
from sdiff_jax.types import Json, Params, UserError

NUM_SHOWN = 16  # images of the picture
NUM_WRITERS = 4  # threads
# Fields of config.sampler that are stored with an image.
STORED_FIELDS = ("name", "steps", "tolerance", "update_rule")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
  """A pretrained model in the diffusers format, and its prompts or classes.

  Attributes:
    folder: the model: a folder, or hf://organization/name.
    published: the model that a config is for, organization/name on the Hugging Face Hub;
      the message about a missing folder names it.
    prompts: texts, "a cat;a dog", or a .json of COCO's captions; image k takes text k
      modulo their number.
    negative_prompt: text that guidance leads away from.
    instruction: text that stands before every prompt, for a network such as SANA.
    labels: classes, "white shark;207"; image k takes class k modulo their number, "" all
      classes in turn.
    size: (height, width) of the images in pixels; () for that of the training images.
    distilled_guidance: scale that networks such as that of Flux take as an input.
    lora: file of adapters in the layout of peft and diffusers, which are added to the
      network's weights; "" for none.
    image: image to start from, noised, or a folder of images, image k modulo their
      number; resized and cropped to the size. "" to start from noise alone.
    strength: the part of the steps that are taken from there: more of them keep less of
      the image.
    timestep_spacing: of the timesteps; "" for the model's own.
    dtype: of weights and hidden layers.
    scan_blocks: whether alike blocks run in a loop over their stacked weights: large
      networks compile many times faster, and images differ by rounding.
  """

  folder: HubPath = ""
  published: str = ""
  prompts: str = ""
  negative_prompt: str = ""
  instruction: str = ""
  labels: str = ""
  size: Annotated[tuple[int, ...], Range(8, 16_384), Length(0, 2)] = ()
  distilled_guidance: Annotated[float, Range(0.0, 100.0)] = 3.5
  lora: str = ""
  image: Path = ""
  strength: Annotated[float, Range(0.0, 1.0)] = published_model.DEFAULT_STRENGTH
  timestep_spacing: Annotated[str, Choices(published_model.SPACINGS)] = ""
  dtype: Annotated[str, Choices(published_model.DTYPES)] = "float32"
  scan_blocks: bool = False


@registry.register(
  "jobs",
  "generate",
  sections={"generate": Generate},
  runtime=("generate",),
  creates_workdir=True,
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes images/00000.png, ..., images.json and images.png; only missing ones.

  Raises:
    UserError: the folder, the prompts or a field does not fit, or existing images were
      made with other settings.
  """
  size, compare = config.sample.batch_size, config.sample.compare_sequential
  section, scale = config.generate, config.sample.guidance
  with config_errors("config.generate"):
    prompts = prompts_lib.read(section.prompts) if section.prompts else []
  described_images.check_paths(workdir, config.sample.num)
  mesh = experiments.mesh(config)
  with config_errors("config.sample"):
    sharding.check_batch(size, sharding.samples(mesh))
  model, sampler = published_model.from_config(config, mesh=mesh)
  prompts, labels = conditions.from_config(config, model, prompts)
  starts = start_images.from_config(config, model)
  where = os.path.join(workdir, "images")
  images = _images(config, prompts, labels, starts, where)
  descriptions = images.descriptions()
  sampler = described_images.stored_window(sampler, descriptions, images.folder)
  missing = [k for k, stored in enumerate(descriptions) if not stored]
  compile_seconds = None
  if missing or compare:
    params = model.params
    pipeline = text_to_image.pipeline(
      model,
      sampler,
      mesh,
      guidance_scale=scale,
      prompts=prompts,
      negative_prompt=section.negative_prompt,
      distilled_guidance=section.distilled_guidance,
      labels=labels,
      seed=config.sample.seed,
    )
    if starts:
      pipeline = start_images.from_images(pipeline, model, starts)
    shape = (size, *pipeline.shape)
    sampler = pipelines.with_window(mesh, sampler, pipeline.placeholder, params, shape)
    begin = time.perf_counter()
    compiled = pipelines.batch_sampler(pipeline, sampler).compile(params, size)
    compile_seconds = time.perf_counter() - begin
    window = sampler.window if sampler.is_parallel else 0
    _make(images, missing, pipeline, compiled, params, size, window)
  if compare:
    indices = np.arange(size) % config.sample.num
    pipelines.report_comparison(pipeline, sampler, compiled, params, indices)
  summary = ""
  if jax.process_index() == 0:
    summary = _finish(images, sampler, mesh, workdir, compile_seconds)
  return (
    f"made {len(missing)} of {config.sample.num} images ({summary}): {images.folder}"
  )


def _images(
  config: ml_collections.ConfigDict,
  prompts: list[str | None],
  labels: Sequence[int],
  starts: Sequence[str],
  folder: str,
) -> Images:
  """Returns the images of a config, each with what determines it."""
  fields = {name: config.sampler[name] for name in STORED_FIELDS}
  generate = config.generate.to_dict()
  for name in ("prompts", "labels", "published", "scan_blocks"):
    del generate[name]
  if not starts:
    del generate["strength"]
  # Images of earlier versions do not have these fields.
  for name in ("size", "distilled_guidance", "instruction", "lora", "image"):
    if generate[name] == getattr(Generate, name):
      del generate[name]
    else:
      generate[name] = file_io.as_json(generate[name])  # a list, as in a file
  common = resumable.flatten({"sampler": fields, "generate": generate})
  common |= {"sample.guidance": config.sample.guidance}
  settings = [
    {"prompt": prompts[k % len(prompts)], "seed": config.sample.seed + k} | common
    for k in range(config.sample.num)
  ]
  for k, of_image in enumerate(settings if labels else ()):
    of_image["label"] = labels[k % len(labels)]
  for k, of_image in enumerate(settings if starts else ()):
    of_image["image"] = os.path.basename(starts[k % len(starts)])
  return Images(folder, settings)


def _make(
  images: Images,
  missing: list[int],
  pipeline: Pipeline,
  sampler: CompiledSampler,
  params: Params,
  size: int,
  window: int,
) -> None:
  """Makes the missing images, and waits for the other processes."""
  # All processes look at the existing images before one of them writes.
  sharding.all_processes(np.ones(1, bool), pipeline.mesh)
  quiet, total = jax.process_index() > 0, len(images.settings)
  done = total - len(missing)
  with (
    Progress(
      total, label="generate", unit="image", initial=done, active=not quiet
    ) as progress,
    concurrent.futures.ThreadPoolExecutor(NUM_WRITERS) as pool,
  ):
    for first in range(0, len(missing), size):
      indices = missing[first : first + size]
      padded = np.array(indices + indices[-1:] * (size - len(indices)))
      begin = time.perf_counter()
      batch = pipelines.start_batch(pipeline, sampler, params, padded)
      pixels, stats = jax.block_until_ready(batch)
      seconds = time.perf_counter() - begin
      stats = jax.device_put(stats, sharding.replicated(pipeline.mesh))
      pipelines.check_finite(sampler, stats.error, indices)
      cost = {"sampler.window": window, "seconds": seconds, "batch": len(indices)}
      texts = _texts(images, indices, stats, cost)
      rows = [(row, image) for row, image in _rows(pixels) if row < len(indices)]
      paths = [images.path(indices[row]) for row, _ in rows]
      about = [texts[row] for row, _ in rows]
      list(pool.map(image_io.save_png, paths, [image for _, image in rows], about))
      progress.add(len(indices))
  sharding.all_processes(np.ones(1, bool), pipeline.mesh)


def _texts(
  images: Images, indices: list[int], stats: SamplingStats, cost: Mapping[str, Json]
) -> list[str]:
  """Returns what the images of a batch say of themselves, as JSON."""
  values = {
    name: np.asarray(getattr(stats, name)).tolist()
    for name in ("num_iterations", "num_evaluations", "error")
  }
  return [
    json.dumps({**images.settings[k], **cost, **{n: v[row] for n, v in values.items()}})
    for row, k in enumerate(indices)
  ]


def _rows(images: jax.Array) -> list[tuple[int, np.ndarray]]:
  """Returns the rows of a batch that this process is to write, and their numbers."""
  return [
    (row + (shard.index[0].start or 0), image)
    for shard in images.addressable_shards
    if shard.replica_id == 0
    for row, image in enumerate(np.asarray(shard.data))
  ]


def _finish(
  images: Images,
  sampler: Sampler,
  mesh: Mesh,
  workdir: str,
  compile_seconds: float | None,
) -> str:
  """Writes images.json and images.png; returns a summary."""
  descriptions = images.descriptions()
  if not all(descriptions):
    raise UserError(f"{images.folder} lost images: the same command makes them again")
  seconds = sum(stored["seconds"] / stored["batch"] for stored in descriptions)
  paths = [images.path(k) for k in range(len(descriptions))]
  summary = {
    "images_per_second": len(descriptions) / seconds,  # without compiling and writing
    "compile_seconds": compile_seconds,
    "devices": [jax.device_count(), jax.devices()[0].device_kind],
    "mesh": dict(mesh.shape),
    "num_steps": sampler.num_steps,
    "images": [
      {"file": os.path.basename(path), **stored}
      for path, stored in zip(paths, descriptions, strict=True)
    ],
  }
  file_io.write_json(os.path.join(workdir, "images.json"), summary)
  shown = np.stack([folder.decode(path) for path in paths[:NUM_SHOWN]])
  image_io.save_png(os.path.join(workdir, "images.png"), image_io.grid(shown))
  stats = {
    name: np.array([stored.get(name, np.inf) for stored in descriptions])
    for name in SamplingStats._fields
  }
  line = pipelines.describe(sampler, SamplingStats(**stats))
  return f"{summary['images_per_second']:.4g} images/s, {line}"
