"""Whole folders in the diffusers format: sequential, and in parallel at tolerance 0."""

import functools
import json
import pathlib
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from closed_forms import one_at_a_time

from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import published_model, start_images, text_to_image
from sdiff_jax.pretrained.diffusers import loading
from sdiff_jax.samplers import Samples, paradigms, sequential
from sdiff_jax.types import Array

MESH = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


class Run(NamedTuple):
  """What a pipeline made.

  Attributes:
    inputs: of the pipeline.
    one: last states of the sequential sampler, [B, ...].
    many: those of ParaDiGMS at tolerance 0, None if it did not run.
    images: decoded from `one`, in [0, 1].
  """

  inputs: dict[str, np.ndarray]
  one: Array
  many: Samples | None
  images: np.ndarray


def arrays(path: pathlib.Path) -> tuple[dict, dict]:
  """Returns the arrays of a peer's file, images of four axes as NHWC, and its facts."""
  with np.load(path) as stored:
    found = dict(stored)
  meta = json.loads(str(found.pop("meta"))) if "meta" in found else {}
  latents = {k: np.moveaxis(v, 1, -1) for k, v in found.items() if "latents" in k}
  return found | latents, meta


def run(
  model: loading.Model,
  x: np.ndarray,
  *,
  name: str,
  steps: int,
  strength: float | None = None,
  image: np.ndarray | None = None,
  eps: np.ndarray | None = None,
  in_parallel: bool = True,
  **options,
) -> Run:
  """Runs a model sequentially and by windows of 5, which makes no change count as none.

  Args:
    model: of a folder.
    x: first states, or with an image their noise, of unit variance, [B, ...].
    name: of the parallel sampler.
    steps: number of steps.
    strength: the part of them that is taken from an image; None to start from noise.
    image: to start from, uint8 [B, H, W, 3].
    eps: noise of the image's latents, [B, ...].
    in_parallel: whether ParaDiGMS runs, too.
    **options: of `text_to_image.pipeline`.
  """
  model, mesh = loading.with_shape(model, x.shape[1:]), MESH()
  schedule, sampler = published_model.build_sampler(
    model.schedule, name=name, steps=steps, strength=strength
  )
  model = model._replace(schedule=schedule)
  pipeline = text_to_image.pipeline(model, sampler, mesh, **options)
  _, inputs = pipeline.requests(np.arange(len(x)))
  table = sampler.tableau

  @quickly
  def sample(params, x, inputs, image, eps):
    denoise, cond = pipeline.denoiser(params, inputs)
    if image is not None:
      pixels = image.astype(jnp.float32) / 127.5 - 1
      z = start_images.latents(model.vae, params["vae"], pixels, eps, mesh)
      x = jnp.float32(table.alpha[0]) * z + jnp.float32(table.init_std) * x
    keys = sequential.keys_from_seeds(np.arange(len(x)))
    args = one_at_a_time(denoise), table, x, keys, cond
    one = sequential.sample(*args)
    many = paradigms.run(*args, window=5, tolerance=0.0) if in_parallel else None
    images = model.vae.decode(params["vae"], one / model.vae.scaling + model.vae.shift)
    return one, many, images

  with mock.patch.object(paradigms, "ULPS", 0):
    one, many, images = sample(model.params, jnp.asarray(x), inputs, image, eps)
  return Run(inputs, one, many, np.clip(np.asarray(images) / 2 + 0.5, 0, 1))


def check_in_parallel(made: Run, steps: int) -> None:
  """Checks that both samplers end alike, to the bit, and prints the passes."""
  many = made.many
  assert many is not None
  np.testing.assert_array_equal(many.x, made.one)
  passes = np.asarray(many.num_iterations).tolist()
  print(f"passes of a window of 5: {passes}, of {steps} sequential steps")
  assert max(passes) <= steps
