"""The training step or the sampling of a config as a program of abstract arrays.

Such a program is lowered and compiled for absent devices, and its memory,
collectives and operations are analyzed (see `capacity.lowering`). No data are read.
"""

import os
from collections.abc import Callable
from typing import NoReturn

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from sdiff_jax import config as configs
from sdiff_jax import losses, registry
from sdiff_jax.capacity import lowering
from sdiff_jax.capacity.lowering import Program
from sdiff_jax.data import Codec, Dataset, LatentCodec, PixelCodec, class_cond, latents
from sdiff_jax.diffusion import guidance, trigflow
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import pipelines, published_model, teachers, text_to_image
from sdiff_jax.experiment import sampling as sampling_lib
from sdiff_jax.experiment import training as training_lib
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.experiment.pipelines import Pipeline
from sdiff_jax.io import storage
from sdiff_jax.pretrained.diffusers import block_loop, loading, text_encoding
from sdiff_jax.pretrained.diffusers import model as model_lib
from sdiff_jax.samplers import Sampler
from sdiff_jax.types import Array, CondSpec, Network, Params, UserError

KINDS = ("train", "sample")


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Program:
  """Returns the program that config.rehearse.program names.

  Args:
    config: of a run, or of the job `generate`.
    mesh: the devices to compile for.

  Raises:
    UserError: the batch does not divide over the mesh, or a field has no valid value.
  """
  if config.job == "generate":
    return generation(config, mesh)
  program = {"train": training, "sample": sampling}[config.rehearse.program]
  return program(config, _experiment(config, abstract_dataset(config), mesh))


def _experiment(
  config: ml_collections.ConfigDict, dataset: Dataset, mesh: Mesh
) -> Experiment:
  return Experiment(
    dataset,
    experiments.network(config, dataset),
    mesh,
    config.sigma_d,
    bool(config.model.get("guidance", False)),
    trigflow.END_TIME in losses.facts(config.loss).cond,
  )


def abstract_dataset(config: ml_collections.ConfigDict) -> Dataset:
  """Returns the data set, or one without images if config.rehearse.shape is set.

  Raises:
    UserError: the data set refuses a field.
  """
  shape = tuple(config.rehearse.shape)
  if not shape:
    return registry.build("data", config.data.to_dict(), "config.data")
  if config.model.name == "pretrained":
    return published_dataset(config.model.folder, shape)
  classes = class_cond(config.rehearse.classes)
  return Dataset(_no_data, 0, classes, PixelCodec(shape))


def published_dataset(folder: str, shape: tuple[int, ...]) -> Dataset:
  """Returns a data set without images for the network of a folder.

  Args:
    folder: in the diffusers format; only its config files are read.
    shape: (H, W, C) of the samples, latents for a folder with an autoencoder.

  Raises:
    UserError: a file is missing or damaged.
  """
  model = loading.abstract(loading.configs(folder))
  codec: Codec = PixelCodec(shape)
  if coder := model.vae:
    channels = shape[-1:]
    moments = (coder.shift,) * channels[0], (1 / coder.scaling,) * channels[0]
    codec = LatentCodec(shape, *moments, latents.VAE_MIN_PIXEL["vae"])
  if not model.text_encoders:
    return Dataset(_no_data, 0, class_cond(model.unet.classes), codec)
  shapes = text_encoding.shapes(model, model.params)
  specs = {name: CondSpec(shape, np.float16) for name, shape in shapes.items()}
  empty = {guidance.empty_name(name): spec for name, spec in specs.items()}
  return Dataset(_no_data, 0, specs | empty, codec)


def _no_data(indices: np.ndarray) -> NoReturn:
  raise UserError("config.rehearse.shape: names a shape alone; there are no data")


def training(config: ml_collections.ConfigDict, experiment: Experiment) -> Program:
  """Returns the training step of a config, with the teacher that it distills.

  Raises:
    UserError: the batch does not divide over the mesh, or a field has no valid value.
  """
  dataset, mesh = experiment.dataset, experiment.mesh
  size, parts = config.train.batch_size, config.train.grad_accum_steps
  with config_errors("config.train"):
    sharding.check_batch(size, sharding.batch(mesh), parts)
  teacher, frozen = abstract_teacher(config, dataset)
  trainer = training_lib.build_trainer(config, experiment.network, teacher, mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(trainer.create_state, key)

  def flops(remat: bool) -> float:
    variant = config if remat else experiments.model_variant(config, "without_remat")
    counted, _ = abstract_teacher(config, dataset, "unrolled")
    return training_lib.step_flops(variant, dataset, counted, state, key, frozen)

  batch = training_lib.batch_shapes(dataset, size)
  return lowering.training_step(trainer, mesh, state, batch, key, frozen, flops)


def abstract_teacher(
  config: ml_collections.ConfigDict, dataset: Dataset, *variants: str
) -> tuple[Network | None, Params]:
  """Returns the network of the teacher and the shapes of its parameters.

  Args:
    config: of the student.
    dataset: of the student.
    *variants: of the networks, see `build.model_variant`.

  Returns:
    (None, None) for a loss without a teacher.

  Raises:
    UserError: there is neither a run of the teacher nor its config file.
  """
  if config.teacher.folder:
    network = teachers.published_teacher(
      experiments.model_variant(config, *variants), dataset
    )
  else:
    teacher_config = _teacher_config(config)
    if teacher_config is None:
      return None, None
    variant = experiments.model_variant(teacher_config, *variants)
    network = experiments.network(variant, dataset)
  if config.teacher.weak_workdir:
    stored = workdir_lib.read(config.teacher.weak_workdir)
    weak = experiments.network(experiments.model_variant(stored, *variants), dataset)
    scale = config.teacher.autoguidance
    network = teachers.autoguided_teacher(network, weak, scale)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return network, jax.eval_shape(network.init, key)


def _teacher_config(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict | None:
  """Returns the config of the teacher's run, or of its file if there is no run yet.

  The dtype of a teacher from a file is that of the student.
  """
  file, workdir = config.teacher.config, config.teacher.workdir
  if not teachers.needs_teacher(config):
    return None
  if storage.exists(os.path.join(workdir, "config.json")):
    return workdir_lib.read(workdir)
  teacher_config = configs.load(
    file, f"config.teacher.config={file!r}: no such file, and no run there"
  )
  if "dtype" in teacher_config.model and "dtype" in config.model:
    teacher_config.model.dtype = config.model.dtype
  return teacher_config


def sampling(config: ml_collections.ConfigDict, experiment: Experiment) -> Program:
  """Returns the program of a batch of samples of a network trained here.

  Raises:
    UserError: the batch or the window does not divide over the mesh, or there is no
      window.
  """
  everywhere = sharding.replicated(experiment.mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    jax.eval_shape(experiment.network.init, key),
  )
  pipeline = sampling_lib.pipeline(config, experiment)
  unrolled = experiments.model_variant(config, "unrolled")
  counted = _experiment(unrolled, experiment.dataset, experiment.mesh)
  return _batch_of_samples(
    config,
    pipeline,
    sampling_lib.build_sampler(config),
    params,
    sampling_lib.pipeline(unrolled, counted).placeholder,
  )


def generation(config: ml_collections.ConfigDict, mesh: Mesh) -> Program:
  """Returns the program of a batch of samples by a model of the diffusers format.

  Only the config files of its folder are read. The decoder is left out, since it runs
  once, and the U-Net in every iteration.

  Raises:
    UserError: the batch or the window does not divide over the mesh, or there is no
      window, or the folder does not fit.
  """
  model, sampler = published_model.from_config(config, abstract=True)
  weights = {k: v for k, v in model.params.items() if k != "vae"}
  model = model._replace(vae=None, params=weights)
  pipeline = text_to_image.pipeline(
    model, sampler, mesh, guidance_scale=config.sample.guidance
  )
  params = text_to_image.params_with_sharding(model, mesh)
  if config.generate.scan_blocks:
    params = model_lib.stacked(model, params)

  def counted(params: Params, x: Array) -> Array:
    return pipeline.placeholder(block_loop.unstacked(params), x)

  return _batch_of_samples(config, pipeline, sampler, params, counted)


def _batch_of_samples(
  config: ml_collections.ConfigDict,
  pipeline: Pipeline,
  sampler: Sampler,
  params: Params,
  counted: Callable[[Params, Array], Array],
) -> Program:
  """Returns the program of a batch of samples of a pipeline.

  The operations are those of `counted`, the placeholder without a loop over blocks.
  """
  with config_errors("config.sample"):
    sharding.check_batch(config.sample.batch_size, sharding.samples(pipeline.mesh))
  with config_errors("config.sampler"):
    return lowering.sampling(
      pipelines.batch_sampler(pipeline, sampler),
      sampler,
      counted,
      params,
      shape=pipeline.shape,
      batch_size=config.sample.batch_size,
    )
