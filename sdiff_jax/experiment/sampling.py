"""Samples of a trained network: which, by what sampler, over which devices."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sdiff_jax import config as configs
from sdiff_jax.data import pipeline
from sdiff_jax.diffusion import guidance, trigflow
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.samplers import autotune, sequential
from sdiff_jax.samplers import sampler as sampler_lib
from sdiff_jax.samplers._sliding_window import Samples
from sdiff_jax.samplers.sampler import Sampler
from sdiff_jax.types import Array, Cond, Denoiser, Params, UserError

ROWS = 10  # of a grid of samples; its columns are the classes
# (params, seeds [B], labels [B]) -> images uint8 [B, H, W, C] and a Result whose x is
# None.
Call = Callable[[Params, Array, Array], tuple[Array, Samples]]


def plan(config: ml_collections.ConfigDict, sampler: str | None = None) -> Sampler:
  """Returns the plan of config.sampler, or of a word such as "heun/16".

  A word that names config.sampler itself keeps its timesteps.

  Raises:
    UserError: an unknown sampler, or values that do not fit.
  """
  fields = config.sampler.to_dict()
  coarse = fields.pop("coarse_workdir")
  if sampler is not None:
    name, steps = configs.name_and_number(sampler, "evaluate.samplers")
    if (name, steps) != (config.sampler.name, config.sampler.steps):
      fields |= {"name": name, "steps": int(steps), "timesteps": ()}
    fields["window"] = min(fields["window"], int(steps))
    fields["eta"] = config.sampler.eta if name.endswith("ddim") else 0.0
  try:
    chosen = sampler_lib.build(sigma_d=config.sigma_d, **fields)
  except ValueError as error:
    raise UserError(f"config.{error}") from error
  if coarse and chosen.loop != "srds" and sampler is None:
    raise UserError(f"config.sampler.coarse_workdir={coarse}: only for srdsddim")
  return chosen


def denoiser(
  experiment: Experiment, params: Params, guidance_scale: float = 1.0
) -> Denoiser:
  """Returns the denoiser of the experiment's network, with classifier-free guidance."""
  scale = guidance_scale

  def net(x: Array, t: Array, cond: Cond) -> Array:
    return experiment.network.apply(params, x, t, cond)

  def with_scale(x: Array, t: Array, cond: Cond) -> Array:
    return net(x, t, cond | {"guidance": jnp.full(t.shape, scale, jnp.float32)})

  if experiment.guidance_input:
    net_or_guided = with_scale
  else:
    net_or_guided = net if scale == 1 else guidance.classifier_free(net, scale)
  return trigflow.denoiser(net_or_guided, experiment.sigma_d)


def sampler(
  config: ml_collections.ConfigDict, experiment: Experiment, chosen: Sampler
) -> Call:
  """Returns what makes a batch of images, jitted; its window has been chosen.

  Image k depends on seeds[k] and labels[k] alone, so neither the batch size nor the
  mesh changes it beyond rounding.

  Raises:
    UserError: sampler.coarse_workdir is no work directory of the same images, or the window
      does not divide over the mesh.
  """
  source = experiment.dataset
  check_images(experiment)
  coarse, coarse_params, coarse_scale = _coarse(config, experiment, chosen)
  scale = config.sample.guidance
  if chosen.loop:
    with config_errors("config.sampler"):
      sharding.check_window(chosen.window, experiment.mesh)

  def generate(
    others: dict[str, Params], params: Params, seeds: Array, labels: Array
  ) -> tuple[Array, Samples]:
    keys = sequential.keys_from_seeds(seeds)
    result = sampler_lib.run(
      chosen,
      denoiser(experiment, params, scale),
      sequential.sample_prior(chosen.table, keys, source.shape),
      keys,
      {"label": labels},
      sharding=sharding.window(experiment.mesh),
      coarse=denoiser(coarse, others["coarse"], coarse_scale) if coarse else None,
    )
    return _decoded(experiment, others["vae"], result.x), result._replace(x=None)

  over_samples = sharding.samples(experiment.mesh)
  jitted = jax.jit(
    sharding.with_mesh(experiment.mesh, generate),
    in_shardings=(None, None, over_samples, over_samples),
    out_shardings=over_samples,
  )
  others = {"coarse": coarse_params, "vae": None}
  if experiment.vae is not None:
    params = experiment.vae[1]
    others["vae"] = sharding.device_put_global(
      params, sharding.state(params, experiment.mesh)
    )
  return functools.partial(jitted, others)


def check_images(experiment: Experiment) -> None:
  """Raises a UserError if nothing makes images of what the network makes."""
  if experiment.dataset.normaliser:
    pipeline.check_pixels(experiment.dataset)
  if experiment.dataset.latent and experiment.vae is None:
    raise UserError(
      "config.data are latents: name the folder of their autoencoder, config.vae, "
      "which makes images of them"
    )


def image_shape(experiment: Experiment) -> tuple[int, int, int]:
  """Returns (H, W, C) of the images that are sampled."""
  if experiment.vae is None:
    return experiment.dataset.shape
  (height, width, _), factor = experiment.dataset.shape, experiment.vae[0].factor
  return height * factor, width * factor, 3


def _decoded(experiment: Experiment, vae_params: Params, x: Array) -> Array:
  """Returns uint8 images of x0."""
  source, sigma_d = experiment.dataset, experiment.sigma_d
  if experiment.vae is None:
    return pipeline.decode(source, x, sigma_d)
  decode = functools.partial(experiment.vae[0].decode, vae_params)
  values = pipeline.unscaled(source, x, sigma_d)
  images = sharding.map_one_per_device(experiment.mesh, decode)(values)
  return pipeline.pixels(images, source.low)


def _coarse(
  config: ml_collections.ConfigDict, experiment: Experiment, chosen: Sampler
) -> tuple[Experiment | None, Params, float]:
  """Returns experiment, parameters and guidance of parareal's coarse network, if any."""
  workdir = config.sampler.coarse_workdir
  if not workdir or chosen.loop != "srds":
    return None, None, 1.0
  stored = workdir_lib.read(workdir)
  stored.mesh, stored.vae = config.mesh, ""
  coarse, params = workdir_lib.trained(stored, workdir)
  if coarse.dataset.shape != experiment.dataset.shape:
    raise UserError(
      f"config.sampler.coarse_workdir={workdir}: makes images of {coarse.dataset.shape}, not of "
      f"{experiment.dataset.shape}"
    )
  return coarse, params, stored.sample.guidance


def with_window(
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  chosen: Sampler,
  params: Params,
  batch_size: int,
) -> Sampler:
  """Returns the plan with a window: its own, or one that the machine's timings say.

  The same on every process.
  """

  def denoise(params: Params, x: Array) -> Array:
    shapes = pipeline.conditions(experiment.dataset, len(x))
    cond = {name: jnp.zeros(c.shape, c.dtype) for name, c in shapes.items()}
    net = denoiser(experiment, params, config.sample.guidance)
    return net(x, jnp.ones(len(x)), cond)

  shape = (batch_size, *experiment.dataset.shape)
  return autotune.window(chosen, experiment.mesh, denoise, params, shape)


def seeds_and_labels(
  config: ml_collections.ConfigDict, experiment: Experiment, first: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns seeds and labels of images first, first + 1, ..., int32 [count] each."""
  sample, classes = config.sample, experiment.dataset.classes
  seeds = np.arange(first, first + count, dtype=np.int32) + sample.seed
  if sample.label < 0:
    return seeds, seeds % max(classes, 1)
  return seeds, np.full_like(seeds, sample.label)


def compiled(
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  call: Call,
  params: Params,
  batch_size: int,
) -> Call:
  """Returns the call, compiled for a batch size."""
  seeds, labels = _inputs(config, experiment, 0, batch_size)
  program = call.func.lower(*call.args, params, seeds, labels).compile()
  return functools.partial(program, *call.args)


def _inputs(
  config: ml_collections.ConfigDict, experiment: Experiment, first: int, batch_size: int
) -> tuple[jax.Array, ...]:
  """Returns seeds and labels [batch_size] over the devices."""
  over_samples = sharding.samples(experiment.mesh)
  both = seeds_and_labels(config, experiment, first, batch_size)
  return sharding.device_put_global(both, (over_samples, over_samples))


def start_batch(
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  call: Call,
  params: Params,
  first: int,
  batch_size: int,
) -> tuple[Array, Samples]:
  """Returns images first, first + 1, ..., and what they took, over `samples`.

  They are being computed still: only who reads them waits for the devices.

  Args:
    config: gives the first seed and the labels (config.sample).
    experiment: gives the mesh and the classes.
    call: `sampler(...)`, or its compiled form for this batch size.
    params: parameters to sample from.
    first: image k is made from seed + k.
    batch_size: images to make.
  """
  return call(params, *_inputs(config, experiment, first, batch_size))


def generate(
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  call: Call,
  params: Params,
  *,
  num: int,
  batch_size: int,
  field: str = "sample.batch_size",
) -> Iterator[tuple[np.ndarray, np.ndarray, Samples]]:
  """Yields batches of images uint8 [n, H, W, C], labels [n] and what they took.

  Args:
    config: gives the first seed and the labels (config.sample).
    experiment: gives the mesh and the classes.
    call: `sampler(...)`, or its compiled form for this batch size.
    params: parameters to sample from.
    num: images in all.
    batch_size: images a call; the last batch is filled up, then cut.
    field: of the config that gave the batch size, for the error.

  Raises:
    UserError: the batch size does not divide over the mesh.
  """
  mesh = experiment.mesh
  with config_errors("config"):
    sharding.check_batch(batch_size, sharding.samples(mesh), name=field)
  for first in range(0, num, batch_size):
    made = start_batch(config, experiment, call, params, first, batch_size)
    made = jax.device_put(made, sharding.replicated(mesh))
    count = min(batch_size, num - first)
    images, result = made
    result = Samples(None, *(np.asarray(x)[:count] for x in result[1:]))
    labels = seeds_and_labels(config, experiment, first, count)[1]
    yield np.asarray(images)[:count], labels, result


def grid_size(experiment: Experiment) -> tuple[int, int]:
  """Returns the number of images and of columns of a grid of samples."""
  columns = experiment.dataset.classes or ROWS
  columns = columns if columns <= 10 else ROWS
  return ROWS * columns, columns
