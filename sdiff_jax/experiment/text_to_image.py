"""Samples of a model of the diffusers format, over the devices of a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from sdiff_jax import config as configs
from sdiff_jax.data import pipeline
from sdiff_jax.diffusion import guidance
from sdiff_jax.distributed import sharding
from sdiff_jax.pretrained.diffusers import loading, scheduler
from sdiff_jax.pretrained.diffusers.loading import Model
from sdiff_jax.pretrained.diffusers.scheduler import Schedule
from sdiff_jax.samplers import sampler as sampler_lib
from sdiff_jax.samplers import sequential
from sdiff_jax.samplers._sliding_window import Samples
from sdiff_jax.samplers.sampler import Sampler
from sdiff_jax.types import Array, Denoiser, Params, PRNGKey, UserError

# (params, seeds int32 [B], tokens int32 [B, L], negative int32 [1, L]) -> images uint8
# [B, H, W, C] and a Result whose x is None. Without text both tokens are None.
Call = Callable[..., tuple[Array, Samples]]
TYPES = ("float32", "bfloat16", "float16")
SOLVER = ("name", "steps", "tolerance", "update_rule")  # fields of config.sampler


def from_config(
  config: ml_collections.ConfigDict, *, abstract: bool = False
) -> tuple[Model, Sampler]:
  """Returns the model, its schedule as it is solved, and the plan.

  Args:
    config: of the job `generate`.
    abstract: read config files alone; weights are shapes.

  Raises:
    UserError: the folder or a field does not fit.
  """
  _check_fields(config)
  folder, dtype = config.generate.folder, config.generate.dtype
  if abstract:
    model = loading.abstract(loading.configs(folder), dtype=dtype)
  else:
    model = loading.load(folder, dtype=dtype)
  try:
    schedule, chosen = plan(
      model.schedule,
      **{k: config.sampler[k] for k in SOLVER},
      window=config.sampler.window,
      spacing=config.generate.timestep_spacing,
    )
  except ValueError as error:
    raise UserError(f"config.{error}") from error
  return model._replace(schedule=schedule), chosen


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
  own = ("timesteps", "eta", "coarse_workdir", "temperature")
  if any(config.sampler[name] != configs.base().sampler[name] for name in own):
    raise UserError(
      f"config.sampler: {', '.join(own)} are for networks trained here alone"
    )
  try:
    sampler_lib.parse(config.sampler.name)
  except ValueError as error:
    raise UserError(f"config.{error}") from error


def plan(
  schedule: Schedule, *, name: str, steps: int, spacing: str = "", **loop: Any
) -> tuple[Schedule, Sampler]:
  """Returns the schedule as it is to be solved, and the plan.

  Args:
    schedule: the model's.
    name: a solver, maybe with a loop in front (see `plans`).
    steps: number of steps.
    spacing: of the timesteps (see `paths.timesteps`); "" for the schedule's own.
    **loop: window, tolerance and rule of the plan.

  Raises:
    ValueError: an unknown name, or values that do not fit.
  """
  front, solver = sampler_lib.parse(name)
  schedule = schedule._replace(solver=solver, spacing=spacing or schedule.spacing)
  return schedule, sampler_lib.from_tableau(
    front, scheduler.table(schedule, steps), **loop
  )


def texts(model: Model, params: dict[str, Params], tokens: Array) -> Array:
  """Returns the condition "text" [B, L, E] of tokens int32 [B, L]."""
  return model.text_encoder.apply(params["text_encoder"], tokens).hidden


def denoiser(
  model: Model,
  chosen: Sampler,
  params: dict[str, Params],
  empty: Array | None,
  scale: float,
) -> Denoiser:
  """Returns the guided denoiser of a model, for the table of a plan.

  Args:
    model: its schedule is what `plan` returned.
    chosen: the plan.
    params: of the model.
    empty: the text [L, E] of classifier-free guidance, empty or negative; None for a
      model without text.
    scale: of the guidance; 1 is none.
  """
  net = functools.partial(model.unet.apply, params["unet"])
  if scale != 1:
    net = guidance.classifier_free(net, scale, guidance.without_text(empty))
  return scheduler.denoiser(net, model.schedule, chosen.table)


def latents(
  model: Model,
  chosen: Sampler,
  params: dict[str, Params],
  x: Array,
  keys: PRNGKey,
  tokens: Array | None,
  negative: Array | None,
  *,
  scale: float,
  mesh: Mesh,
) -> Samples:
  """Returns what the plan makes of the first states x [B, ...], before any decoder.

  Args:
    model: its schedule is what `plan` returned.
    chosen: the plan, with its window.
    params: of the model.
    x: first states, [B, ...].
    keys: one key a sample, [B].
    tokens: of the prompts, int32 [B, L], or None.
    negative: of the negative prompt, int32 [1, L], or None.
    scale: of the guidance; 1 is none.
    mesh: the devices.
  """
  cond, empty = None, None
  if tokens is not None:
    cond = {"text": texts(model, params, tokens)}
    empty = texts(model, params, negative)[0]
  net, over = denoiser(model, chosen, params, empty, scale), sharding.window(mesh)
  return sampler_lib.run(chosen, net, x, keys, cond, sharding=over)


def pixels(model: Model, params: dict[str, Params], x: Array, mesh: Mesh) -> Array:
  """Returns uint8 images of what was sampled, decoded one on each device at a time."""
  if model.vae is None:
    return pipeline.pixels(x)
  decode = functools.partial(model.vae.decode, params["vae"])
  images = sharding.map_one_per_device(mesh, decode)(x / model.vae.scaling)
  return pipeline.pixels(images)


def sampler(model: Model, chosen: Sampler, mesh: Mesh, *, scale: float = 1.0) -> Call:
  """Returns what makes a batch of images, jitted; image k is made of seeds[k] alone.

  It can be lowered and compiled with shapes in place of all its arguments (see
  `diffusers_folder.abstract`), for devices that are not here.

  Args:
    model: its schedule is what `plan` returned.
    chosen: the plan, with its window.
    mesh: the devices; samples are spread over `data` and `fsdp`, windows over `window`.
    scale: of classifier-free guidance; 1 is none.
  """

  def generate(
    params: dict[str, Params],
    seeds: Array,
    tokens: Array | None,
    negative: Array | None,
  ) -> tuple[Array, Samples]:
    keys = sequential.keys_from_seeds(seeds)
    x = sequential.sample_prior(chosen.table, keys, model.unet.shape)
    made = latents(
      model, chosen, params, x, keys, tokens, negative, scale=scale, mesh=mesh
    )
    return pixels(model, params, made.x, mesh), made._replace(x=None)

  over_samples, everywhere = sharding.samples(mesh), sharding.replicated(mesh)
  return jax.jit(
    sharding.with_mesh(mesh, generate),
    in_shardings=(None, over_samples, over_samples, everywhere),
    out_shardings=(over_samples, everywhere),
  )


def shapes(model: Model, batch_size: int, mesh: Mesh) -> tuple:
  """Returns the arguments of `sampler(...)` as shapes, the weights with shardings."""
  where = sharding.state(model.params, mesh)
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model.params, where
  )
  seeds = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
  if model.text_encoder is None:
    return params, seeds, None, None
  length = model.tokenizer.length if model.tokenizer else model.text_encoder.length
  tokens, negative = (
    jax.ShapeDtypeStruct((n, length), jnp.int32) for n in (batch_size, 1)
  )
  return params, seeds, tokens, negative
