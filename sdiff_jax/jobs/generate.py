"""Job `generate`: makes images by a model in a folder of the diffusers format.

Each image is a PNG that holds its prompt, its seed, how it was made and what it took,
so what is there says what is missing, and what was made otherwise.
"""

import concurrent.futures
import functools
import json
import os
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from jax.sharding import Mesh

from sdiff_jax import registry
from sdiff_jax.data import folder
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import text_to_image
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.io import file_io, image_io, resumable
from sdiff_jax.pretrained.diffusers import prompts as prompts_lib
from sdiff_jax.pretrained.diffusers.loading import Model
from sdiff_jax.samplers import autotune
from sdiff_jax.samplers.sampler import Sampler
from sdiff_jax.types import UserError

STATS = ("passes", "evaluations", "error")  # of a Result, one an image
SHOWN = 16  # images of the picture
WRITERS = 4  # threads


class PendingImages(NamedTuple):
  """What is to be made, and by what.

  Attributes:
    folder: where the images go.
    wanted: what decides each image: prompt, seed and fields of the config.
    model: on the host, its schedule as it is solved.
    chosen: the plan.
    mesh: the devices.
    scale: of the guidance.
    negative: negative prompt.
  """

  folder: str
  wanted: list[dict[str, Any]]
  model: Model
  chosen: Sampler
  mesh: Mesh
  scale: float
  negative: str


DEFAULTS = {
  "generate": {
    "folder": "",  # model in the diffusers format: a folder, or hf://organization/name
    # Texts, "a cat;a dog", or a .json of COCO's captions; image k takes text k modulo
    # their number.
    "prompts": "",
    "negative_prompt": "",  # text that guidance leads away from
    "timestep_spacing": "",  # trailing, leading, linspace; "" for the model's own
    "dtype": "float32",  # of weights and hidden layers: float32, bfloat16, float16
  }
}


@registry.register(
  "jobs", "generate", defaults=DEFAULTS, runtime=("generate",), creates_workdir=True
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes images/00000.png, ..., images.json and images.png; only what is missing.

  Raises:
    UserError: the folder, the captions or a field does not fit, or the images there
      were made otherwise.
  """
  size, compare = config.sample.batch_size, config.sample.compare_sequential
  work, there = _prepare(config, os.path.join(workdir, "images"))
  missing = [k for k, found in enumerate(there) if not found]
  compiled = None
  if missing or compare:
    params = sharding.device_put_global(
      work.model.params, sharding.state(work.model.params, work.mesh)
    )
    work = _with_window(work, params, size)
    begin = time.perf_counter()
    call = _compiled(work, work.chosen, params, size)
    compiled = time.perf_counter() - begin
    _make(work, functools.partial(call, params), missing, size)
  if compare:
    alone = _compiled(work, work.chosen._replace(loop=""), params, size)
    inputs = _inputs(work, [k % len(there) for k in range(size)])
    calls = ((lambda c=c: c(params, *inputs)[0]) for c in (call, alone))
    line = autotune.compare_with_sequential(work.mesh, size, *calls)
    if jax.process_index() == 0:
      print(line, file=sys.stderr)
  took = _finish(work, workdir, compiled) if jax.process_index() == 0 else ""
  return f"made {len(missing)} of {len(there)} images ({took}): {work.folder}"


def _prepare(
  config: ml_collections.ConfigDict, images: str
) -> tuple[PendingImages, list]:
  """Returns the work, and what is there of it (see `_there`)."""
  chosen, scale = config.generate, config.sample.guidance
  prompts = prompts_lib.read(chosen.prompts) if chosen.prompts else []
  mesh = experiments.mesh(config)
  with config_errors("config.sample"):
    sharding.check_batch(config.sample.batch_size, sharding.samples(mesh))
  model, plan = text_to_image.from_config(config)
  prompts = _check_texts(model, chosen, prompts, scale)
  fields = {k: config.sampler[k] for k in text_to_image.SOLVER}
  sections = {"sampler": fields, "generate": chosen.to_dict()}
  del sections["generate"]["prompts"]
  settings = resumable.flatten(sections) | {"sample.guidance": scale}
  wanted = [
    {"prompt": prompts[k % len(prompts)], "seed": config.sample.seed + k} | settings
    for k in range(config.sample.num)
  ]
  work = PendingImages(images, wanted, model, plan, mesh, scale, chosen.negative)
  there = _there(work)
  return work._replace(chosen=_go_on(plan, there, images)), there


def _go_on(plan: Sampler, there: list[dict[str, Any] | None], images: str) -> Sampler:
  """Returns the plan with the window of the images that are there.

  Raises:
    UserError: another one is asked for.
  """
  windows = {found["sampler.window"] for found in there if found}
  if plan.loop and not plan.window and windows:
    return plan._replace(window=windows.pop())
  if plan.loop and windows - {plan.window}:
    raise UserError(
      f"{images} holds images of config.sampler.window={windows.pop()}, not "
      f"{plan.window}; take another --workdir, or the same value"
    )
  return plan


def _check_texts(
  model: Model, chosen: ml_collections.ConfigDict, prompts: list[str], scale: float
) -> list[str | None]:
  """Returns the prompts, [None] for a model without text."""
  if model.unet.text is None:
    if prompts or chosen.negative or scale != 1:
      raise UserError(
        f"{chosen.folder} takes no text: leave config.generate.prompts and negative "
        "empty, and config.sample.guidance 1"
      )
    return [None]
  if model.text_encoder is None or model.tokenizer is None:
    raise UserError(f"{chosen.folder} has no text encoder, or no tokenizer")
  if chosen.negative and scale == 1:
    raise UserError(
      "config.generate.negative_prompt: has no effect with config.sample.guidance=1"
    )
  return prompts or prompts_lib.read(chosen.prompts)


def _path(images: str, k: int) -> str:
  return os.path.join(images, f"{k:05d}.png")


def _there(work: PendingImages) -> list[dict[str, Any] | None]:
  """Returns what the images that are there say of themselves, None for the others.

  Raises:
    UserError: one was made otherwise.
  """
  there = [_facts(_path(work.folder, k)) for k in range(len(work.wanted))]
  for k, (found, wanted) in enumerate(zip(there, work.wanted, strict=True)):
    if found is None:
      continue
    differ = resumable.differences({n: found.get(n) for n in wanted}, wanted)
    if differ:
      raise UserError(
        f"{_path(work.folder, k)} was made otherwise: {', '.join(differ)}; take "
        "another --workdir, or the same values"
      )
  return there


def _facts(path: str) -> dict[str, Any] | None:
  """Returns what a PNG of ours says of itself, None where there is none."""
  if not os.path.exists(path):
    return None
  try:
    found = json.loads(image_io.about(path))
    return found if "sampler.window" in found else None
  except (*folder.UNREADABLE, TypeError) as error:
    print(f"{path} is damaged, making it again: {error}", file=sys.stderr)
    return None


def _with_window(work: PendingImages, params: dict, size: int) -> PendingImages:
  """Returns the work with a window, timed where none was given."""
  model = work.model

  def denoise(params: dict, x: jax.Array) -> jax.Array:
    cond, empty = None, None
    if model.text_encoder is not None:
      shape = (model.tokenizer.length, model.unet.text)
      empty = jnp.zeros(shape)
      cond = {"text": jnp.zeros((len(x), *shape))}
    net = text_to_image.denoiser(model, work.chosen, params, empty, work.scale)
    return net(x, jnp.ones(len(x)), cond)

  shape = (size, *model.unet.shape)
  chosen = autotune.window(work.chosen, work.mesh, denoise, params, shape)
  if chosen.loop:
    with config_errors("config.sampler"):
      sharding.check_window(chosen.window, work.mesh)
  return work._replace(chosen=chosen)


def _compiled(work: PendingImages, chosen: Sampler, params: dict, size: int) -> Any:
  call = text_to_image.sampler(work.model, chosen, work.mesh, scale=work.scale)
  shapes = text_to_image.shapes(work.model, size, work.mesh)
  return call.lower(*shapes).compile()


def _inputs(work: PendingImages, chosen: list[int]) -> tuple:
  """Returns seeds, tokens and negative tokens of images, over the devices."""
  over_samples = sharding.samples(work.mesh)
  seeds = np.array([work.wanted[k]["seed"] for k in chosen], np.int32)
  if work.model.text_encoder is None:
    return sharding.device_put_global(seeds, over_samples), None, None
  encode = work.model.tokenizer.encode
  tokens = encode([work.wanted[k]["prompt"] for k in chosen])
  where = over_samples, over_samples, sharding.replicated(work.mesh)
  return sharding.device_put_global((seeds, tokens, encode([work.negative])), where)


def _make(work: PendingImages, call: Any, missing: list[int], size: int) -> None:
  """Makes the images that are missing, and waits for the other processes."""
  # All look at what is there before one writes.
  sharding.all_processes(np.ones(1, bool), work.mesh)
  quiet, total = jax.process_index() > 0, len(work.wanted)
  with (
    tqdm.tqdm(
      total=total,
      initial=total - len(missing),
      unit="image",
      desc="generate",
      disable=quiet or None,
    ) as bar,
    concurrent.futures.ThreadPoolExecutor(WRITERS) as pool,
  ):
    for first in range(0, len(missing), size):
      chosen = missing[first : first + size]
      inputs = _inputs(work, chosen + chosen[-1:] * (size - len(chosen)))
      begin = time.perf_counter()
      images, result = jax.block_until_ready(call(*inputs))
      seconds = time.perf_counter() - begin
      took = {name: np.asarray(getattr(result, name)).tolist() for name in STATS}
      facts = [
        work.wanted[k]
        | {"sampler.window": work.chosen.window, "seconds": seconds}
        | {"batch": len(chosen)}
        | {name: values[row] for name, values in took.items()}
        for row, k in enumerate(chosen)
      ]
      rows = [r for r in _rows(images) if r[0] < len(chosen)]
      paths = [_path(work.folder, chosen[row]) for row, _ in rows]
      about = [json.dumps(facts[row]) for row, _ in rows]
      list(pool.map(image_io.save_png, paths, [image for _, image in rows], about))
      bar.update(len(chosen))
  sharding.all_processes(np.ones(1, bool), work.mesh)


def _rows(images: jax.Array) -> list[tuple[int, np.ndarray]]:
  """Returns the rows of a batch that this process is to write, and their numbers."""
  return [
    (row + (shard.index[0].start or 0), image)
    for shard in images.addressable_shards
    if shard.replica_id == 0
    for row, image in enumerate(np.asarray(shard.data))
  ]


def _finish(work: PendingImages, workdir: str, compiled: float | None) -> str:
  """Writes images.json and images.png; returns what the images took, in words."""
  there = _there(work)
  lost = [k for k, found in enumerate(there) if found is None]
  if lost:
    raise UserError(f"{work.folder} has lost images: the same command makes them again")
  seconds = sum(found["seconds"] / found["batch"] for found in there)
  names = [os.path.basename(_path("", k)) for k in range(len(there))]
  summary = {
    "images_per_second": len(there) / seconds,  # without compilation and writing
    "compile_seconds": compiled,
    "devices": [jax.device_count(), jax.devices()[0].device_kind],
    "mesh": dict(work.mesh.shape),
    "rows": work.chosen.table.evaluations,
    "images": [{"file": n} | found for n, found in zip(names, there, strict=True)],
  }
  path = os.path.join(workdir, "images.json")
  file_io.write_text(path, json.dumps(summary, indent=2))
  shown = [folder.decode(_path(work.folder, k)) for k in range(len(there))[:SHOWN]]
  image_io.save_png(os.path.join(workdir, "images.png"), image_io.grid(np.stack(shown)))
  passes, evaluations = (
    np.mean([found[name] for found in there]) for name in ("passes", "evaluations")
  )
  return (
    f"{summary['images_per_second']:.4g} images/s, {evaluations:.4g} evaluations each "
    f"in {passes:.4g} passes, {summary['rows']} one by one"
  )
