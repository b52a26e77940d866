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

from sdiff_jax import config as configs
from sdiff_jax import diffusers_folder, sharding, writer
from sdiff_jax.data import captions, folder
from sdiff_jax.diffusers_folder import Model
from sdiff_jax.interfaces import UserError
from sdiff_jax.jobs import experiment as experiments
from sdiff_jax.jobs import published, timing
from sdiff_jax.samplers import plans
from sdiff_jax.samplers.plans import Plan

TYPES = ("float32", "bfloat16", "float16")
TOOK = ("passes", "evaluations", "error")  # of a Result, one an image
SHOWN = 16  # images of the picture
WRITERS = 4  # threads


class Work(NamedTuple):
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
  chosen: Plan
  mesh: Mesh
  scale: float
  negative: str


def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes images/00000.png, ..., images.json and images.png; only what is missing.

  Raises:
    UserError: the folder, the captions or a field does not fit, or the images there
      were made otherwise.
  """
  size, compare = config.sample.batch_size, config.sample.compare
  work, there = _prepare(config, os.path.join(workdir, "images"))
  missing = [k for k, found in enumerate(there) if not found]
  compiled = None
  if missing or compare:
    params = sharding.spread(
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
    line = timing.beside(work.mesh, size, *calls)
    if jax.process_index() == 0:
      print(line, file=sys.stderr)
  took = _finish(work, workdir, compiled) if jax.process_index() == 0 else ""
  return f"made {len(missing)} of {len(there)} images ({took}): {work.folder}"


def _prepare(config: ml_collections.ConfigDict, images: str) -> tuple[Work, list]:
  """Returns the work, and what is there of it (see `_there`)."""
  chosen, scale = config.generate, config.sample.guidance
  _check_fields(config)
  prompts = captions.read(chosen.prompts) if chosen.prompts else []
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch(
    config.sample.batch_size, sharding.samples(mesh), "sample.batch_size"
  )
  model = diffusers_folder.load(chosen.folder, dtype=chosen.dtype)
  prompts = _check_texts(model, chosen, prompts, scale)
  fields = {k: config.sampler[k] for k in ("name", "steps", "tolerance", "rule")}
  try:
    schedule, plan = published.plan(
      model.schedule, **fields, window=config.sampler.window, spacing=chosen.spacing
    )
  except ValueError as error:
    raise UserError(f"config.{error}") from error
  sections = {"sampler": fields, "generate": chosen.to_dict()}
  del sections["generate"]["prompts"]
  settings = configs.flat(sections) | {"sample.guidance": scale}
  wanted = [
    {"prompt": prompts[k % len(prompts)], "seed": config.sample.seed + k} | settings
    for k in range(config.sample.num)
  ]
  model = model._replace(schedule=schedule)
  work = Work(images, wanted, model, plan, mesh, scale, chosen.negative)
  there = _there(work)
  return work._replace(chosen=_go_on(plan, there, images)), there


def _check_fields(config: ml_collections.ConfigDict) -> None:
  """Raises a UserError for what can be seen to be wrong before anything is read."""
  chosen = config.generate
  if not chosen.folder:
    raise UserError(
      "config.generate.folder is empty: name a folder of the diffusers format, or "
      "hf://organisation/name"
    )
  if chosen.dtype not in TYPES:
    raise UserError(
      f"config.generate.dtype={chosen.dtype!r}: take one of {', '.join(TYPES)}"
    )
  own = ("angles", "eta", "coarse", "temperature")
  if any(config.sampler[name] != configs.base().sampler[name] for name in own):
    raise UserError(
      f"config.sampler: {', '.join(own)} are for networks trained here alone"
    )
  try:
    plans.parse(config.sampler.name)
  except ValueError as error:
    raise UserError(f"config.{error}") from error


def _go_on(plan: Plan, there: list[dict[str, Any] | None], images: str) -> Plan:
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
      "config.generate.negative: has no effect with config.sample.guidance=1"
    )
  return prompts or captions.read(chosen.prompts)


def _path(images: str, k: int) -> str:
  return os.path.join(images, f"{k:05d}.png")


def _there(work: Work) -> list[dict[str, Any] | None]:
  """Returns what the images that are there say of themselves, None for the others.

  Raises:
    UserError: one was made otherwise.
  """
  there = [_facts(_path(work.folder, k)) for k in range(len(work.wanted))]
  for k, (found, wanted) in enumerate(zip(there, work.wanted, strict=True)):
    if found is None:
      continue
    differ = experiments.differences({n: found.get(n) for n in wanted}, wanted)
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
    found = json.loads(writer.about(path))
    return found if "sampler.window" in found else None
  except (*folder.UNREADABLE, TypeError) as error:
    print(f"{path} is damaged, making it again: {error}", file=sys.stderr)
    return None


def _with_window(work: Work, params: dict, size: int) -> Work:
  """Returns the work with a window, timed where none was given."""
  model = work.model

  def denoise(params: dict, x: jax.Array) -> jax.Array:
    cond, empty = None, None
    if model.text_encoder is not None:
      shape = (model.tokenizer.length, model.unet.text)
      empty = jnp.zeros(shape)
      cond = {"text": jnp.zeros((len(x), *shape))}
    net = published.denoiser(model, work.chosen, params, empty, work.scale)
    return net(x, jnp.ones(len(x)), cond)

  shape = (size, *model.unet.shape)
  chosen = timing.window(work.chosen, work.mesh, denoise, params, shape)
  if chosen.loop:
    sharding.check_window(chosen.window, work.mesh)
  return work._replace(chosen=chosen)


def _compiled(work: Work, chosen: Plan, params: dict, size: int) -> Any:
  call = published.sampler(work.model, chosen, work.mesh, scale=work.scale)
  shapes = published.shapes(work.model, size, work.mesh)
  return call.lower(*shapes).compile()


def _inputs(work: Work, chosen: list[int]) -> tuple:
  """Returns seeds, tokens and negative tokens of images, over the devices."""
  over_samples = sharding.samples(work.mesh)
  seeds = np.array([work.wanted[k]["seed"] for k in chosen], np.int32)
  if work.model.text_encoder is None:
    return sharding.spread(seeds, over_samples), None, None
  encode = work.model.tokenizer.encode
  tokens = encode([work.wanted[k]["prompt"] for k in chosen])
  where = over_samples, over_samples, sharding.replicated(work.mesh)
  return sharding.spread((seeds, tokens, encode([work.negative])), where)


def _make(work: Work, call: Any, missing: list[int], size: int) -> None:
  """Makes the images that are missing, and waits for the other processes."""
  # All look at what is there before one writes.
  sharding.agreed(np.ones(1, bool), work.mesh)
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
      took = {name: np.asarray(getattr(result, name)).tolist() for name in TOOK}
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
      list(pool.map(writer.save_png, paths, [image for _, image in rows], about))
      bar.update(len(chosen))
  sharding.agreed(np.ones(1, bool), work.mesh)


def _rows(images: jax.Array) -> list[tuple[int, np.ndarray]]:
  """Returns the rows of a batch that this process is to write, and their numbers."""
  return [
    (row + (shard.index[0].start or 0), image)
    for shard in images.addressable_shards
    if shard.replica_id == 0
    for row, image in enumerate(np.asarray(shard.data))
  ]


def _finish(work: Work, workdir: str, compiled: float | None) -> str:
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
  writer.save_text(path, json.dumps(summary, indent=2))
  shown = [folder.decode(_path(work.folder, k)) for k in range(len(there))[:SHOWN]]
  writer.save_png(os.path.join(workdir, "images.png"), writer.grid(np.stack(shown)))
  passes, evaluations = (
    np.mean([found[name] for found in there]) for name in ("passes", "evaluations")
  )
  return (
    f"{summary['images_per_second']:.4g} images/s, {evaluations:.4g} evaluations each "
    f"in {passes:.4g} passes, {summary['rows']} one by one"
  )
