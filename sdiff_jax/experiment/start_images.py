"""Images that sampling starts from, noised: image-to-image generation."""

import dataclasses
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from sdiff_jax.data import folder
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.experiment.pipelines import Inputs, Pipeline
from sdiff_jax.io import bounded, image_io, storage
from sdiff_jax.pretrained.diffusers.model import Model
from sdiff_jax.pretrained.diffusers.vae import Autoencoder
from sdiff_jax.samplers import sequential
from sdiff_jax.types import Array, Params, UserError

PIXELS = "start_pixels"  # the input of the pipeline
NUM_CHECKED = 16  # images that are decoded before any work starts


def from_config(config: ml_collections.ConfigDict, model: Model) -> list[str]:
  """Returns the files that images start from, [] to start from noise alone.

  Args:
    config: of the job `generate`.
    model: gives the size; the first files are decoded, to check them.

  Raises:
    UserError: there are none, or one cannot be read.
  """
  path = config.generate.image
  if not path:
    return []
  with config_errors("config.generate"):
    found = files(path)
  for file in found[:NUM_CHECKED]:
    read(file, _shape(model))
  return found


def files(path: str) -> list[str]:
  """Returns the images of a folder, or the one that a path names.

  Args:
    path: of an image, or of a folder of images.

  Raises:
    ValueError: there is none; the message starts with `image=`.
  """
  if storage.remote(path) or not os.path.exists(path):
    raise ValueError(f"image={path!r}: must be an image, or a folder of images, here")
  if not os.path.isdir(path):
    return [path]
  try:
    return folder.files(path)
  except ValueError as error:
    raise ValueError(str(error).replace("dir=", "image=", 1)) from error


def read(path: str, shape: tuple[int, int, int]) -> np.ndarray:
  """Returns the central part of an image, uint8 [H, W, C].

  Args:
    path: of the image.
    shape: (H, W, C); the image is resized to cover the height and the width.

  Raises:
    UserError: the image cannot be read.
  """
  height, width, channels = shape
  try:
    with image_io.open_image(path) as opened:
      image = folder.crop(image_io.to_color(opened, channels), height, width)
      return np.asarray(image).reshape(shape)
  except folder.UNREADABLE as error:
    reason = bounded.short(error) or type(error).__name__
    raise UserError(f"{path} cannot be read ({reason}); replace it") from error


def _shape(model: Model) -> tuple[int, int, int]:
  """Returns (H, W, C) of the images of a model, in pixels."""
  if model.vae is None:
    return model.unet.shape
  return *model.size, 3


def from_images(pipeline: Pipeline, model: Model, paths: Sequence[str]) -> Pipeline:
  """Returns a pipeline whose first states are noised images.

  Latents of an autoencoder are drawn as in diffusers, scaling (mean + std eps - shift);
  without one, pixels in [-1, 1] are noised. All noise is of the image's seed.

  Args:
    pipeline: of the model.
    model: with a schedule of fewer steps (see `scheduler.tableau`).
    paths: image k starts from file k modulo their number.
  """
  shape, mesh = _shape(model), pipeline.mesh

  def inputs(size: int) -> dict[str, jax.ShapeDtypeStruct]:
    pixels = jax.ShapeDtypeStruct((size, *shape), jnp.uint8)
    return pipeline.inputs(size) | {PIXELS: pixels}

  def requests(indices: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    seeds, rows = pipeline.requests(indices)
    pixels = [read(paths[k % len(paths)], shape) for k in indices]
    return seeds, rows | {PIXELS: np.stack(pixels)}

  def data(params: Params, inputs: Inputs, seeds: Array) -> Array:
    images = inputs[PIXELS].astype(jnp.float32) / 127.5 - 1
    if model.vae is None:
      return images
    keys = sequential.keys_from_seeds(seeds)
    eps = sequential.noise_before(keys, -1, pipeline.shape)
    return latents(model.vae, params["vae"], images, eps, mesh)

  return dataclasses.replace(
    pipeline,
    inputs=inputs,
    requests=requests,
    data=data,
    input_shardings={**pipeline.input_shardings, PIXELS: sharding.samples(mesh)},
  )


def latents(
  coder: Autoencoder, params: Params, images: Array, eps: Array, mesh: Mesh
) -> Array:
  """Returns the latents of images, [B, h, w, C].

  Args:
    coder: the autoencoder.
    params: of the autoencoder.
    images: in [-1, 1], [B, H, W, 3].
    eps: noise of unit variance, [B, h, w, C].
    mesh: the devices; each encodes one image at a time.
  """

  def encode(images: Array) -> Array:
    return jnp.concatenate(coder.encode(params, images), axis=-1)

  moments = sharding.map_one_per_device(mesh, encode)(images)
  mean, std = jnp.split(moments, 2, axis=-1)
  return coder.scaling * (mean + std * eps - coder.shift)
