"""Images of a trained network: its pipeline, its sampler, seeds and labels."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sdiff_jax import config as configs
from sdiff_jax import samplers
from sdiff_jax.diffusion import guidance, trigflow
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import pipelines, prompts
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.experiment.pipelines import Pipeline
from sdiff_jax.samplers import Sampler
from sdiff_jax.types import Array, Cond, Denoiser, Network, Params, UserError

MAX_GUIDANCE = 1000.0
GRID_ROWS = 10  # of a grid of samples; its columns are the classes


def build_sampler(
  config: ml_collections.ConfigDict,
  name_and_steps: str | None = None,
  *,
  strict: bool = True,
) -> Sampler:
  """Returns the sampler of config.sampler, or of a text such as "heun/16".

  A text that names config.sampler itself keeps its timesteps. Only those fields of
  config.sampler are passed on that the sampler takes.

  Args:
    config: the config.
    name_and_steps: "name/steps"; None for those of config.sampler.
    strict: refuse fields that were changed although config.sampler.name does not take
      them. Fields are never refused for a text, since they may be for another one.

  Raises:
    UserError: an unknown sampler, or a value or a field that does not fit.
  """
  section, defaults = config.sampler.to_dict(), configs.base().sampler.to_dict()
  name, steps = section.pop("name"), section.pop("steps")
  if name_and_steps is not None:
    field = "evaluate.samplers"
    other, number = configs.name_and_number(name_and_steps, field)
    if number != round(number):
      raise UserError(f"config.{field}: {name_and_steps!r}: must have whole steps")
    if (other, number) != (name, steps):
      name, steps, section["timesteps"] = other, int(number), ()
    section["window"], strict = min(section["window"], steps), False
  coarse = section.pop("coarse_workdir")
  with config_errors("config.sampler"):
    taken = samplers.options(name)
    changed = {k for k, value in section.items() if strict and value != defaults[k]}
    fields = {k: v for k, v in section.items() if k in taken or k in changed}
    sampler = samplers.build(name, sigma_d=config.sigma_d, steps=steps, **fields)
    if strict and coarse and not sampler.takes("coarse_denoiser"):
      raise ValueError(f"coarse_workdir={coarse}: only for srdsddim, not for {name!r}")
  return sampler


def switch(config: ml_collections.ConfigDict, name: str) -> None:
  """Sets config.sampler.name, and resets the fields that this sampler does not take.

  Args:
    config: the config, whose other fields may be for another sampler.
    name: of the sampler; an unknown one is left to `build_sampler` to refuse.
  """
  if name in samplers.names():
    kept = {"name", "steps", *samplers.options(name)}
    if samplers.takes(name, "coarse_denoiser"):
      kept.add("coarse_workdir")
    for field, default in configs.base().sampler.items():
      if field not in kept:
        config.sampler[field] = default
  config.sampler.name = name


def denoiser(
  experiment: Experiment, params: Params, guidance_scale: float | None = 1.0
) -> Denoiser:
  """Returns the denoiser of an experiment's network, with classifier-free guidance.

  Args:
    experiment: gives the network and the data's standard deviation.
    params: of the network.
    guidance_scale: of classifier-free guidance; 1 is none (see `network_denoiser`).
  """
  return network_denoiser(
    experiment.network,
    params,
    sigma_d=experiment.sigma_d,
    guidance_scale=guidance_scale,
    guidance_input=experiment.guidance_input,
    end_time_input=experiment.end_time_input,
  )


def network_denoiser(
  network: Network,
  params: Params,
  *,
  sigma_d: float,
  guidance_scale: float | None = 1.0,
  guidance_input: bool = False,
  end_time_input: bool = False,
) -> Denoiser:
  """Returns the denoiser of a TrigFlow network, with classifier-free guidance.

  Args:
    network: the network.
    params: its parameters.
    sigma_d: standard deviation of the data.
    guidance_scale: of classifier-free guidance; 1 is none, and None is the scale of
      each sample, its condition "guidance" [N].
    guidance_input: whether the network takes the scale as an input; otherwise guidance
      costs two evaluations of it.
    end_time_input: whether the network is a flow map; solvers that know one time then
      use its velocity, F(x, t, s = t).
  """

  def net(x: Array, t: Array, cond: Cond) -> Array:
    if end_time_input and trigflow.END_TIME not in (cond or {}):
      cond = trigflow.with_end_time(cond, t)
    return network.apply(params, x, t, cond)

  def with_scale(x: Array, t: Array, cond: Cond) -> Array:
    scale = jnp.full(t.shape, guidance_scale, jnp.float32)
    return net(x, t, guidance.with_scale(cond, scale))

  if guidance_scale is None:
    sampled = net if guidance_input else guidance.at_sampled_scale(net)
    return trigflow.denoiser(sampled, sigma_d)
  if guidance_input:
    return trigflow.denoiser(with_scale, sigma_d)
  if guidance_scale != 1:
    net = guidance.classifier_free(net, guidance_scale)
  return trigflow.denoiser(net, sigma_d)


def placeholder(
  experiment: Experiment, guidance_scale: float
) -> Callable[[Params, Array], Array]:
  """Returns params, x [N, ...] -> d [N, ...]: a call of the network to be timed.

  Args:
    experiment: gives the network and its conditions, which are zero.
    guidance_scale: of classifier-free guidance; 1 is none.
  """

  def call(params: Params, x: Array) -> Array:
    shapes = {k: spec.batch(len(x)) for k, spec in experiment.dataset.cond.items()}
    cond = {name: jnp.zeros(c.shape, c.dtype) for name, c in shapes.items()}
    return denoiser(experiment, params, guidance_scale)(x, jnp.ones(len(x)), cond)

  return call


def pipeline(config: ml_collections.ConfigDict, experiment: Experiment) -> Pipeline:
  """Returns the pipeline of a trained network; its parameters are an argument.

  Raises:
    UserError: the data are not images and have no decoder, sampler.coarse_workdir
      is not a work directory of the same images, or a field of config.sample is out of
      range.
  """
  check_images(experiment)
  check_request(config, experiment)
  dataset, scale = experiment.dataset, config.sample.guidance
  coarse, coarse_params, coarse_scale = _coarse(config, experiment)
  constants = {"coarse": coarse_params, "vae": None}
  if experiment.vae is not None:
    weights = experiment.vae[1]
    where = sharding.state(weights, experiment.mesh)
    constants["vae"] = sharding.device_put_global(weights, where)

  def coarse_denoiser(constants: Params) -> Denoiser:
    return denoiser(coarse, constants["coarse"], coarse_scale)

  def inputs(batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: spec.batch(batch_size) for name, spec in dataset.cond.items()}

  return Pipeline(
    mesh=experiment.mesh,
    shape=dataset.shape,
    denoiser=lambda params, inputs: (denoiser(experiment, params, scale), inputs),
    placeholder=placeholder(experiment, scale),
    decode_checked=lambda constants, _, x: decode_checked(
      experiment, constants["vae"], x
    ),
    inputs=inputs,
    input_shardings=dict.fromkeys(inputs(1), sharding.samples(experiment.mesh)),
    requests=functools.partial(
      seeds_and_conditions, config, experiment, texts=prompts.read(config, experiment)
    ),
    constants=constants,
    coarse_denoiser=coarse_denoiser if coarse else None,
    dtype=experiment.dtype,
  )


def check_request(
  config: ml_collections.ConfigDict, experiment: Experiment, num: int = 0
) -> None:
  """Checks seeds, class and guidance of config.sample against the network.

  Args:
    config: the config.
    experiment: gives the network.
    num: number of samples; 0 for sample.num.

  Raises:
    UserError: a class or a scale that the network does not have.
  """
  label, scale = config.sample.label, config.sample.guidance
  classes = experiment.num_classes
  check_seeds(config.sample.seed, num or config.sample.num)
  if type(label) is not int or not -1 <= label < max(classes, 0):
    allowed = (
      f"or a class, 0 to {classes - 1}" if classes else "the network has no classes"
    )
    raise UserError(
      f"config.sample.label={label}: must be -1 for all classes in turn, {allowed}"
    )
  check_guidance(scale)
  has_conditions = classes or experiment.has_texts
  if scale != 1 and not has_conditions and not experiment.guidance_input:
    raise UserError(
      f"config.sample.guidance={scale}: must be 1 for a network without classes"
    )


def check_guidance(scale: float) -> None:
  """Raises a UserError unless a scale of classifier-free guidance is in its range."""
  if isinstance(scale, bool) or not 0 <= scale <= MAX_GUIDANCE:  # NaN is not
    raise UserError(
      f"config.sample.guidance={scale}: must be from 0 to {MAX_GUIDANCE:g}; 1 is none"
    )


def check_seeds(seed: int, num: int) -> None:
  """Checks that `num` seeds from the first one on are seeds.

  Raises:
    UserError: they are not integers from 0 to 2^31 - 1.
  """
  largest = samplers.MAX_SEED - max(num, 1) + 1
  if type(seed) is not int or not 0 <= seed <= largest:
    raise UserError(
      f"config.sample.seed={seed}: must be an integer from 0 to {largest}; image k is "
      "made from seed + k"
    )


def check_images(experiment: Experiment) -> None:
  """Raises a UserError if there is no decoder from samples to images."""
  experiments.check_images(experiment.dataset, has_decoder=experiment.vae is not None)


def image_shape(experiment: Experiment) -> tuple[int, int, int]:
  """Returns (H, W, C) of the images that are sampled."""
  if experiment.vae is None:
    return experiment.dataset.shape
  (height, width, _), factor = experiment.dataset.shape, experiment.vae[0].factor
  return height * factor, width * factor, 3


def decode(experiment: Experiment, vae_params: Params, x0: Array) -> Array:
  """Returns uint8 images [B, H, W, C] of samples x0, which may be latents."""
  return decode_checked(experiment, vae_params, x0)[0]


def decode_checked(
  experiment: Experiment, vae_params: Params, x0: Array
) -> tuple[Array, Array]:
  """Returns the images of `decode`, and whether the decoder's pixels are finite.

  Args:
    experiment: gives the data set, and the autoencoder of latents.
    vae_params: of the autoencoder; None without one.
    x0: samples, [B, ...].

  Returns:
    Images uint8 [B, H, W, C], and bool [B].
  """
  dataset, sigma_d = experiment.dataset, experiment.sigma_d
  if experiment.vae is None:
    return dataset.codec.to_images(x0, sigma_d), jnp.ones(x0.shape[:1], bool)
  decode_latents = functools.partial(experiment.vae[0].decode, vae_params)
  one_per_device = sharding.map_one_per_device(experiment.mesh, decode_latents)
  outputs = []

  def decoder(latents: Array) -> Array:
    outputs.append(one_per_device(latents))
    return outputs[0]

  images = dataset.codec.to_images(x0, sigma_d, decoder)
  return images, pipelines.finite_samples(outputs[0])


def _coarse(
  config: ml_collections.ConfigDict, experiment: Experiment
) -> tuple[Experiment | None, Params, float]:
  """Returns experiment, parameters and guidance of parareal's coarse network, if any."""
  workdir = config.sampler.coarse_workdir
  if not workdir:
    return None, None, 1.0
  stored = workdir_lib.read(workdir)
  stored.mesh, stored.vae = config.mesh, ""
  coarse, params = workdir_lib.trained(stored, workdir)
  if coarse.dataset.shape != experiment.dataset.shape:
    raise UserError(
      f"config.sampler.coarse_workdir={workdir}: samples {coarse.dataset.shape}, not "
      f"{experiment.dataset.shape}"
    )
  return coarse, params, stored.sample.guidance


def seeds_and_conditions(
  config: ml_collections.ConfigDict,
  experiment: Experiment,
  indices: np.ndarray,
  texts: Mapping[str, np.ndarray] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns seeds, int32 [B], and conditions, each [B, ...], of samples.

  Args:
    config: sample.seed is the first sample's seed, sample.label the class of all
      samples or -1 for all classes in turn.
    experiment: gives the data set, which declares the conditions.
    indices: numbers of the samples, int [B].
    texts: conditions of the prompts, each [n, ...], of which sample k has that of
      prompt k modulo n; None for those of the data set.

  Raises:
    UserError: values of a condition come from the data set, which is not here.
  """
  seeds = np.asarray(indices, np.int32) + np.int32(config.sample.seed)
  if texts is not None:
    return seeds, {k: v[np.asarray(indices) % len(v)] for k, v in texts.items()}
  with config_errors("config.data"):
    cond = experiment.dataset.conditions(seeds)
  if config.sample.label >= 0:
    for name, spec in experiment.dataset.cond.items():
      if spec.num_classes:
        cond[name] = np.full_like(cond[name], config.sample.label)
  return seeds, cond


def seeds_and_labels(
  config: ml_collections.ConfigDict, experiment: Experiment, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns seeds and classes of samples, int32 [B] each; 0 for data without classes.

  Args:
    config: see `seeds_and_conditions`.
    experiment: gives the data set.
    indices: numbers of the samples, int [B].
  """
  seeds, cond = seeds_and_conditions(config, experiment, indices)
  return seeds, np.maximum(experiment.dataset.class_of(cond, len(seeds)), 0)


def grid_size(experiment: Experiment) -> tuple[int, int]:
  """Returns the number of images and of columns of a grid of samples."""
  columns = experiment.dataset.num_classes or GRID_ROWS
  columns = columns if columns <= 10 else GRID_ROWS
  return GRID_ROWS * columns, columns
