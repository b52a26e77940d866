"""The pieces that a config names: data set, network, mesh, autoencoder."""

import dataclasses
import os
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from sdiff_jax import losses, registry
from sdiff_jax.data import Dataset, LatentCodec, PixelCodec
from sdiff_jax.diffusion import guidance, trigflow
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import caption_tokens
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.io import storage
from sdiff_jax.models.layers import lora
from sdiff_jax.models.pretrained import Pretrained, Reader
from sdiff_jax.pretrained.diffusers import hub, loading, saving, trigflow_network
from sdiff_jax.pretrained.diffusers.vae import Autoencoder
from sdiff_jax.types import Json, Network, Params, UserError


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The pieces of an experiment.

  Attributes:
    dataset: the data that the network was trained on, or is to be trained on.
    network: the TrigFlow network.
    mesh: the devices.
    sigma_d: standard deviation that the data are scaled to.
    guidance_input: whether the network takes the scale of classifier-free guidance as
      an input; otherwise guidance costs two evaluations.
    end_time_input: whether the network is a flow map, which takes a second time.
    vae: autoencoder of a data set of latents, with its parameters; None without one.
    num_classes: number of classes that the network is conditioned on; 0 for none.
    has_texts: whether the network is conditioned on texts.
    dtype: type of the network's hidden layers, for messages.
  """

  dataset: Dataset
  network: Network
  mesh: Mesh
  sigma_d: float
  guidance_input: bool = False
  end_time_input: bool = False
  vae: tuple[Autoencoder, Params] | None = None
  num_classes: int = 0
  has_texts: bool = False
  dtype: str = "float32"


def build(config: ml_collections.ConfigDict) -> Experiment:
  """Returns the pieces that a config names.

  Raises:
    UserError: a piece or the mesh refuses its fields.
  """
  return from_dataset(
    config, registry.build("data", config.data.to_dict(), "config.data")
  )


def from_dataset(config: ml_collections.ConfigDict, dataset: Dataset) -> Experiment:
  """Returns the pieces that a config names, for a data set that is already built.

  Raises:
    UserError: a piece or the mesh refuses its fields.
  """
  dataset = caption_tokens.encoded(dataset, config.text_encoder)
  return Experiment(
    dataset=dataset,
    network=network(config, dataset),
    mesh=mesh(config),
    sigma_d=config.sigma_d,
    guidance_input=bool(config.model.get("guidance", False)),
    end_time_input=trigflow.END_TIME in losses.facts(config.loss).cond,
    vae=_autoencoder(config.vae, dataset),
    num_classes=dataset.num_classes if config.class_conditional else 0,
    has_texts=any(map(guidance.is_empty_name, dataset.cond)),
    dtype=config.model.get("dtype", "float32"),
  )


def check_images(dataset: Dataset, *, has_decoder: bool = False) -> None:
  """Checks that samples of a data set can become images.

  Args:
    dataset: the data set.
    has_decoder: whether there is an autoencoder's decoder.

  Raises:
    UserError: they cannot.
  """
  try:
    dataset.codec.check_images(has_decoder=has_decoder)
  except ValueError as error:
    raise UserError(f"config.{error}") from error


def mesh(config: ml_collections.ConfigDict) -> Mesh:
  """Returns the mesh of a config.

  Raises:
    UserError: its sizes do not multiply to the number of devices.
  """
  with config_errors("config.mesh"):
    return sharding.make_mesh(**config.mesh)


def _autoencoder(folder: str, dataset: Dataset) -> tuple[Autoencoder, Params] | None:
  """Returns the autoencoder of a data set's latents, with its weights on the host.

  Returns:
    None without a folder.

  Raises:
    UserError: the data are no latents, or latents of another autoencoder.
  """
  if not folder:
    return None
  if not isinstance(dataset.codec, LatentCodec):
    raise UserError(
      f"config.vae={folder}: only for latents, and config.data has other samples; leave "
      "config.vae empty"
    )
  vae, params = loading.autoencoder(folder)
  if vae.channels != dataset.shape[-1]:
    raise UserError(
      f"config.vae={folder}: its latents have {vae.channels} channels, those of "
      f"config.data {dataset.shape[-1]}"
    )
  return vae, params


def network(config: ml_collections.ConfigDict, dataset: Dataset) -> Network:
  """Returns the network of a config for samples of a data set.

  Raises:
    UserError: the network refuses its fields or a condition of the data set.
  """
  cond = {
    name: spec
    for name, spec in dataset.cond.items()
    if not guidance.is_empty_name(name)
    and (config.class_conditional or not spec.num_classes)
  }
  if cond and "cond" not in registry.required("models", config.model.name):
    raise UserError(
      f"config.model.name={config.model.name!r}: has no conditions, but config.data "
      f"has {', '.join(cond)}"
    )
  cond |= losses.facts(config.loss).cond
  given = {"shape": dataset.shape, "cond": cond, "sigma_d": config.sigma_d}
  if "reader" in registry.required("models", config.model.name):
    given["reader"] = _reader(dataset)
  built = registry.build("models", config.model.to_dict(), "config.model", **given)
  if not config.lora.rank:
    return built
  options = {"rank": config.lora.rank, "targets": config.lora.targets}
  with config_errors("config.lora"):
    adapted = lora.with_adapters(built, scale=lora_scale(config), **options)
    jax.eval_shape(adapted.init, jax.random.key(0))  # which checks the names
  return adapted


def lora_scale(config: ml_collections.ConfigDict) -> float:
  """Returns the factor alpha / rank of the adapters of a config."""
  return (config.lora.alpha or config.lora.rank) / config.lora.rank


def merged(config: ml_collections.ConfigDict, params: Params) -> Params:
  """Returns the parameters of a run without adapters, which are merged into weights.

  Args:
    config: of the run.
    params: of its network.
  """
  return lora.merged(params, lora_scale(config)) if config.lora.rank else params


def _reader(dataset: Dataset) -> Reader:
  """Returns the reader of networks in the diffusers format for samples of a data set."""

  def read(folder: str, **options: Any) -> Pretrained:
    codec = dataset.codec
    if not isinstance(codec, LatentCodec | PixelCodec):
      raise ValueError(f"folder={folder}: needs images or their latents as data")
    latents = isinstance(codec, LatentCodec)
    moments = {"mean": codec.mean, "std": codec.std}
    return trigflow_network.network(folder, latents=latents, **moments, **options)

  return read


def published(folder: str, dataset: Dataset, *, label: str, **options: Json) -> Network:
  """Returns the network of a folder in the diffusers format for samples of a data set.

  Args:
    folder: of the network.
    dataset: the data.
    label: name of the section of a config that names the folder, for messages.
    **options: fields of models/pretrained.

  Raises:
    UserError: it is for other data.
  """
  cond = {k: v for k, v in dataset.cond.items() if not guidance.is_empty_name(k)}
  given = {"shape": dataset.shape, "cond": cond, "reader": _reader(dataset)}
  section = {"name": "pretrained", "folder": folder, **options}
  return registry.build("models", section, label, **given)


def is_folder(path: str) -> bool:
  """Returns whether a path is a folder in the diffusers format, and no work directory."""
  return path.startswith(hub.HUB) or storage.exists(os.path.join(path, saving.INDEX))


def model_variant(
  config: ml_collections.ConfigDict, *variants: str
) -> ml_collections.ConfigDict:
  """Returns the config with another program for the same function of the network.

  A network registers its variants as facts, each a function of its fields that returns
  those to change; a variant that it does not register changes nothing.

  Args:
    config: with the network in `config.model`.
    *variants: "unrolled" has no loop over the blocks, whose operations XLA counts once,
      "without_kernels" has attention without a loop, "without_remat" computes nothing
      twice.
  """
  config = config.copy_and_resolve_references()
  facts = registry.lookup("models", config.model.name).facts
  for variant in variants:
    if variant in facts:
      config.model.update(facts[variant](config.model))
  return config
