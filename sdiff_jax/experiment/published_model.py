"""A model in the diffusers format and its sampler, as the config of `generate` names them."""

import functools
from collections.abc import Callable, Mapping

import ml_collections
from jax.sharding import Mesh

from sdiff_jax import config as configs
from sdiff_jax import registry, samplers
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import sampling
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.models.layers import lora
from sdiff_jax.pretrained.diffusers import fit, loading, lora_file, scheduler
from sdiff_jax.pretrained.diffusers import model as model_lib
from sdiff_jax.pretrained.diffusers.flow_schedule import FlowSchedule
from sdiff_jax.pretrained.diffusers.loading import Model
from sdiff_jax.pretrained.diffusers.scheduler import Schedule
from sdiff_jax.samplers import Sampler
from sdiff_jax.types import Json, Params, PyTree, UserError

DTYPES = ("float32", "bfloat16", "float16")
SPACINGS = ("", "leading", "linspace", "trailing")  # "" is the model's own
DEFAULT_STRENGTH = 0.6  # part of the steps that are taken from a noised image
CONSISTENCY = "consistency"  # the solver of consistency models


def from_config(
  config: ml_collections.ConfigDict,
  *,
  abstract: bool = False,
  mesh: Mesh | None = None,
) -> tuple[Model, Sampler]:
  """Returns the model, whose schedule names the solver, and the sampler.

  Args:
    config: of the job `generate`.
    abstract: read the model's config files alone; weights are shapes.
    mesh: the devices that the weights are sharded over, and where they are stacked for
      config.generate.scan_blocks; None for the host.

  Raises:
    UserError: the folder or a field does not fit.
  """
  _check_fields(config)
  folder, dtype = config.generate.folder, config.generate.dtype
  if abstract:
    model = loading.abstract(loading.configs(folder), dtype=dtype)
  else:
    place = None if mesh is None else functools.partial(sharding.state, mesh=mesh)
    model = loading.load(folder, dtype=dtype, place=place)
  if config.vae and not abstract:
    model = _with_vae(config, model, place)
  if config.generate.lora and not abstract:
    model = _with_lora(config, model)
  if config.generate.scan_blocks and mesh is not None:
    model = model._replace(params=model_lib.stacked(model, model.params))
  if size := tuple(config.generate.size):
    model = _with_size(model, size)
  if (text := config.generate.instruction) and not abstract:
    with config_errors("config.generate"):
      model = model_lib.with_instruction(model, text)
  if model.vae is None and model.unet.shape[-1] not in (1, 3):
    raise UserError(
      f"config.generate.folder={folder}: makes latents of {model.unet.shape[-1]} channels, "
      "and has no vae to decode them; name one in config.vae"
    )
  return with_sampler(config, model)


def with_sampler(
  config: ml_collections.ConfigDict, model: Model
) -> tuple[Model, Sampler]:
  """Returns a model with the schedule of config.sampler, and that sampler.

  Raises:
    UserError: a field does not fit.
  """
  section, defaults = config.sampler.to_dict(), configs.base().sampler.to_dict()
  name, steps, strength = section.pop("name"), section.pop("steps"), None
  if config.generate.image:
    strength = config.generate.strength
    with config_errors("config.generate"):
      scheduler.steps_taken(model.schedule, steps, strength)
  with config_errors("config.sampler"):
    taken = samplers.options(name)
    options = {k: v for k, v in section.items() if k in taken or v != defaults[k]}
    schedule, sampler = build_sampler(
      model.schedule,
      name=name,
      steps=steps,
      spacing=config.generate.timestep_spacing,
      strength=strength,
      **{k: v for k, v in options.items() if k not in _trigflow_fields(defaults)},
    )
    if model.unet.end_time and sampler.tableau.end_time is None:
      raise ValueError(
        f"name={name!r}: the network takes the end time of a step, too; use 'flow_map'"
      )
  return model._replace(schedule=schedule), sampler


def build_sampler(
  schedule: Schedule | FlowSchedule,
  *,
  name: str,
  steps: int,
  spacing: str = "",
  strength: float | None = None,
  **options: Json,
) -> tuple[Schedule | FlowSchedule, Sampler]:
  """Returns the schedule with its solver and spacing, and the sampler.

  Args:
    schedule: the model's.
    name: of the sampler.
    steps: number of steps.
    spacing: of the timesteps; "" for the schedule's own.
    strength: the part of the steps that are taken from a noised image; None to start
      from noise alone.
    **options: of the sampling loop: window, tolerance, ...

  Raises:
    ValueError: an unknown name, or a value that does not fit.
  """
  solver = samplers.solver_of(name)
  if solver != schedule.solver and CONSISTENCY in (solver, schedule.solver):
    raise ValueError(
      f"name={name!r}: among models in the diffusers format, {CONSISTENCY!r} is only for "
      "one with an SCMScheduler or an LCMScheduler, which take no other solver"
    )
  schedule = schedule._replace(solver=solver, spacing=spacing or schedule.spacing)
  tableau = scheduler.tableau(schedule, steps, strength=strength)
  return schedule, samplers.from_tableau(name, tableau, **options)


def _check_fields(config: ml_collections.ConfigDict) -> None:
  """Raises a UserError for a field that is wrong whatever the folder holds."""
  generate, defaults = config.generate, configs.base().sampler
  if not generate.folder:
    name = generate.published or "organization/name"
    raise UserError(
      f"config.generate.folder is empty: set it to hf://{name}, which downloads it, or to "
      f"a copy of https://huggingface.co/{name}; docs/guides/text-to-image.md lists models "
      "and their licenses"
    )
  for field in sorted(_trigflow_fields(defaults)):
    if config.sampler[field] != defaults[field]:
      raise UserError(
        f"config.sampler.{field}={config.sampler[field]}: only for networks trained "
        "here, not for models in the diffusers format"
      )
  if generate.strength != DEFAULT_STRENGTH and not generate.image:
    raise UserError(
      f"config.generate.strength={generate.strength}: has no effect without "
      "config.generate.image, the images to start from"
    )
  sampling.check_guidance(config.sample.guidance)
  sampling.check_seeds(config.sample.seed, config.sample.num)
  others = {
    "sample.label": config.sample.label != -1,
    "sample.checkpoint": config.sample.checkpoint != 0,
  }
  for field, is_set in others.items():
    if is_set:
      raise UserError(
        f"config.{field}: only for networks trained here, not for models in the "
        "diffusers format; leave it out"
      )
  with config_errors("config.sampler"):
    samplers.solver_of(config.sampler.name)


def _with_lora(config: ml_collections.ConfigDict, model: Model) -> Model:
  """Returns a model with the adapters of a file added to the weights of its network.

  Raises:
    UserError: the file is missing or damaged, or its adapters are of another network.
  """
  parts, net = loading.configs(config.generate.folder), model.params["unet"]
  part = next(name for name in fit.PREDICTORS if name in parts)
  adapters = lora_file.load(config.generate.lora, net, part=part)
  params = model.params | {"unet": lora.merge(net, adapters, 1.0)}
  return model._replace(params=params)


def _with_vae(
  config: ml_collections.ConfigDict,
  model: Model,
  place: Callable[[Params], PyTree] | None,
) -> Model:
  """Returns a model with the autoencoder that a config names."""
  if model.vae is not None or model.unet.shape[-1] in (1, 3):
    raise UserError(
      f"config.vae={config.vae}: must be empty, since {config.generate.folder} has a vae, "
      "or makes pixels"
    )
  coder, params = loading.autoencoder(config.vae, dtype=config.generate.dtype)
  if coder.channels != model.unet.shape[-1]:
    raise UserError(
      f"config.vae={config.vae}: has latents of {coder.channels} channels, "
      f"{config.generate.folder} of {model.unet.shape[-1]}"
    )
  if place is not None:
    params = sharding.device_put_global(params, place(params))
  return model._replace(vae=coder, params=model.params | {"vae": params})


def _with_size(model: Model, size: tuple[int, ...]) -> Model:
  """Returns a model whose images have a height and a width in pixels."""
  factor = model.vae.factor if model.vae else 1
  step = factor * model.unet.patch
  if len(size) != 2 or any(side % step for side in size):
    raise UserError(
      f"config.generate.size={size}: must be height and width, multiples of {step}"
    )
  shape = (*(side // factor for side in size), model.unet.shape[-1])
  return loading.with_shape(model, shape)


def _trigflow_fields(section: Mapping[str, Json]) -> set[str]:
  """Returns the fields of `sampler` that only networks trained here have.

  The scheduler of a model in the diffusers format determines timesteps and options of the
  solver, so these are all but the options of sampling loops.

  Args:
    section: all fields.
  """
  loops = (registry.fields("samplers", name) for name in registry.names("samplers"))
  return {*section} - {"name", "steps"}.union(*loops)
