"""The pipeline of a model in the diffusers format: of texts, of classes or of neither."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdiff_jax import data
from sdiff_jax.diffusion import guidance
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import conditions as conditions_lib
from sdiff_jax.experiment import pipelines
from sdiff_jax.experiment.pipelines import Inputs, Pipeline
from sdiff_jax.pretrained.diffusers import scheduler
from sdiff_jax.pretrained.diffusers.loading import Model
from sdiff_jax.samplers import Sampler
from sdiff_jax.types import Array, Cond, Denoiser, Params


def denoiser(
  model: Model,
  sampler: Sampler,
  params: dict[str, Params],
  empty: Cond,
  guidance_scale: float | None,
) -> Denoiser:
  """Returns the denoiser of a model with classifier-free guidance.

  Args:
    model: with the schedule that `published_model.build_sampler` returned.
    sampler: gives the solver's tableau.
    params: of the model.
    empty: conditions of the empty or negative prompt, or of no class, without a batch
      axis; None for a model without conditions.
    guidance_scale: of classifier-free guidance; 1 is none, and None is the scale of
      each sample, its condition "guidance" [N].
  """
  net = functools.partial(model.unet.apply, params["unet"])
  if guidance_scale is None:
    net = guidance.at_sampled_scale(net, guidance.without_text(empty or {}))
  elif guidance_scale != 1:
    without = guidance.without_text(empty or {})
    net = guidance.classifier_free(net, guidance_scale, without)
  return scheduler.denoiser(net, model.schedule, sampler.tableau)


def decode_checked(
  model: Model, params: dict[str, Params], x: Array, mesh: Mesh
) -> tuple[Array, Array]:
  """Decodes samples, one a device at a time.

  Returns:
    Images uint8 [B, H, W, C], and whether the decoder's output is finite, bool [B].
  """
  if model.vae is None:
    return data.to_uint8(x), jnp.ones(len(x), bool)
  decode_latents = functools.partial(model.vae.decode, params["vae"])
  images = sharding.map_one_per_device(mesh, decode_latents)(
    x / model.vae.scaling + model.vae.shift
  )
  return data.to_uint8(images), pipelines.finite_samples(images)


def pipeline(
  model: Model,
  sampler: Sampler,
  mesh: Mesh,
  *,
  guidance_scale: float | None = 1.0,
  prompts: Sequence[str | None] = (None,),
  negative_prompt: str = "",
  distilled_guidance: float = 1.0,
  labels: Sequence[int] = (),
  seed: int = 0,
) -> Pipeline:
  """Returns the pipeline of a model; its parameters are an argument.

  It can be lowered and compiled with shapes in place of the parameters (see
  `loading.abstract`), for absent devices.

  Args:
    model: with the schedule that `published_model.build_sampler` returned.
    sampler: gives the solver's tableau.
    mesh: the devices.
    guidance_scale: of classifier-free guidance; 1 is none, and None makes the scale of
      each image an input, "guidance" [B].
    prompts: image k has prompt k modulo their number; (None,) without text.
    negative_prompt: text that guidance leads away from.
    distilled_guidance: scale that a network takes as an input, without a negative prompt.
    labels: image k has class k modulo their number; () for all classes in turn.
    seed: of the first image.
  """
  dtype = jax.tree.leaves(model.params["unet"])[0].dtype.name
  conditions = conditions_lib.of_model(
    model,
    prompts=prompts,
    negative_prompt=negative_prompt,
    distilled_guidance=distilled_guidance,
    labels=labels,
  )
  by_scale = guidance_scale is None and bool(conditions.shapes(1))
  by_sample, everywhere = sharding.samples(mesh), sharding.replicated(mesh)

  def with_scale(cond: Cond, scale: Array) -> Cond:
    return guidance.with_scale(cond, scale) if by_scale else cond

  def guided(params: Params, inputs: Inputs) -> tuple[Denoiser, Cond]:
    cond, empty = conditions.encode(params, inputs)
    net = denoiser(model, sampler, params, empty, guidance_scale)
    return net, with_scale(cond, inputs.get("guidance"))

  def placeholder(params: Params, x: Array) -> Array:
    shaped = jax.eval_shape(conditions.encode, params, shapes(len(x)))
    cond, empty = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shaped)
    net = denoiser(model, sampler, params, empty, guidance_scale)
    net = sampler.tableau.with_end_time(net)
    return net(x, jnp.ones(len(x)), with_scale(cond, jnp.ones(len(x))))

  def shapes(batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    of_inputs = conditions.shapes(batch_size)
    if by_scale:
      of_inputs |= {"guidance": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}
    return of_inputs

  def requests(indices: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return np.asarray(indices, np.int32) + np.int32(seed), conditions.rows(indices)

  return Pipeline(
    mesh=mesh,
    shape=model.unet.shape,
    denoiser=guided,
    placeholder=placeholder,
    decode_checked=lambda _, params, x: decode_checked(model, params, x, mesh),
    inputs=shapes,
    input_shardings={
      name: everywhere if name in conditions.shared else by_sample for name in shapes(1)
    },
    requests=requests,
    dtype=dtype,
  )


def params_with_sharding(model: Model, mesh: Mesh) -> dict[str, Params]:
  """Returns the shapes of a model's parameters with their sharding over a mesh."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    model.params,
    sharding.state(model.params, mesh),
  )
